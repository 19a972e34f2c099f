"""Pictures: the bytes of a file → uint8 pixels of the size that a program takes, the middle of the picture.

Pixels are not normalised: the program does it. What files are read, and how, is told in `picture_files.py`.
"""

from typing import Literal, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.tasks.picture_files import PILLOW_MAX_PIXELS, Pixels, read_picture, turn_upright

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class PictureSpec(BaseModel):
    """How a picture becomes a program's input: resize its shorter side, then take the middle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(ge=1, description="Rows of the picture that the program takes.")
    width: int = Field(ge=1, description="Columns of the picture that the program takes.")
    resize_shorter_side: int = Field(
        ge=1,
        description="Pixels that the shorter side is resized to, keeping the aspect ratio, before the middle is taken; "
        "at least `height` and `width`.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        description="Filter of the resize; either averages over all pixels when it makes a picture smaller."
    )
    max_pixels: int = Field(
        ge=1,
        le=PILLOW_MAX_PIXELS,
        description="Most pixels of a picture that is still decoded.",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.resize_shorter_side < max(self.height, self.width):
            raise ValueError(
                f"resize_shorter_side={self.resize_shorter_side} must be at least "
                f"height={self.height} and width={self.width}"
            )
        return self


def decode_picture(body: bytes, spec: PictureSpec) -> Pixels:
    """Decode a picture, resize its shorter side, take its middle.

    Args:
        body: the file; its first bytes tell the format.
        spec: the size to deliver and the limits to keep; they are checked before a pixel is decoded.
    Returns: (Y, X, 3) uint8 RGB, Y and X being the spec's height and width.
    Raises: InvalidInput.
    Differs: from resizing the decoded whole and cutting out its middle. The middle is resized straight from its box in
        the source, and a JPEG that is at least twice too large is decoded at 1/2, 1/4 or 1/8 of its size, never below
        `resize_shorter_side` (half the time or less; on photos about 40 dB to the result of the full decode).
    """
    shorter_side = spec.resize_shorter_side
    raw = read_picture(body, max_pixels=spec.max_pixels, choose_size=lambda *_: (shorter_side, shorter_side))
    height, width = (spec.width, spec.height) if raw.is_sideways else (spec.height, spec.width)
    middle = _resize_middle(raw.image, raw.frame, height=height, width=width, spec=spec)
    return turn_upright(middle, raw.orientation)


def _resize_middle(
    picture: Image.Image, frame: tuple[float, float], *, height: int, width: int, spec: PictureSpec
) -> Image.Image:
    """Take the middle `height` x `width` of the picture at the scale where its shorter side has the spec's length.

    Args:
        picture: mode L, RGB or RGBa.
        frame: width and height of the part of it that counts.
    """
    scale = min(frame) / spec.resize_shorter_side
    crop_x, crop_y = min(width * scale, frame[0]), min(height * scale, frame[1])  # rounding may carry it over the edge
    left, top = (frame[0] - crop_x) / 2, (frame[1] - crop_y) / 2
    if scale == 1:  # between pixels there is nothing to gain
        return picture.crop((int(left), int(top), int(left) + width, int(top) + height))
    box = (left, top, min(left + crop_x, picture.width), min(top + crop_y, picture.height))
    return picture.resize((width, height), _FILTERS[spec.interpolation], box=box)
