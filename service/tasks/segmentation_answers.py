"""What image segmentation answers, in JSON."""

from pydantic import BaseModel, ConfigDict, Field

from service.tasks.embedded_picture import EmbeddedPicture
from service.tasks.explanation_answers import MaskExplanation
from service.tasks.task import TaskResult


class SegmentedClass(BaseModel):
    """A class that some of the pixels have."""

    index: int = Field(
        description="Index of the class among the model's classes; its number in the mask.", examples=[3]
    )
    label: str = Field(description="Name of the class.", examples=["road"])
    share: float = Field(description="Share of the picture's pixels; all classes together have 1.", examples=[0.293])


class RunLengths(BaseModel):
    """A mask as run lengths, as COCO's uncompressed RLE has them."""

    size: tuple[int, int] = Field(description="Height and width.", examples=[(360, 480)])
    counts: dict[int, list[int]] = Field(
        description="For each class of the picture, by its index: how many pixels are not of it, how many are, how "
        "many are not, and so on, column by column from the top left.",
        examples=[{0: [0, 2, 2], 3: [2, 2]}],
    )


class ImageSegmentationResult(TaskResult):
    """The class of each pixel of one picture."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "paca-fpn-micro-camvid",
                    "version": "1.1.0",
                    "height": 360,
                    "width": 480,
                    "classes": [
                        {"index": 3, "label": "road", "share": 0.61},
                        {"index": 0, "label": "sky", "share": 0.39},
                    ],
                    "mask": {"media_type": "image/png", "data": "iVBORw0KGgo…"},
                }
            ]
        }
    )

    height: int = Field(description="Rows of the picture as sent, upright, and of the mask.", examples=[360])
    width: int = Field(description="Columns.", examples=[480])
    classes: list[SegmentedClass] = Field(description="The classes that the picture has, largest share first.")
    mask: EmbeddedPicture | RunLengths = Field(description="The class of each pixel, as `mask_format` says.")
    overlay: EmbeddedPicture | None = Field(default=None, description="If `overlay` was asked for.")
    explanation: MaskExplanation | None = Field(default=None, description="If `explain` is `clusters`.")
