"""Image classification: a picture in, its most probable classes out.

The program takes `image`, uint8 (Y, X, 3), RGB, and returns `logits`, (L,); it normalises the pixels itself.
"""

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from service.errors import InvalidInput, ModelFailed
from service.sample import Arrays, Sample
from service.tasks.pictures import PICTURE_MEDIA_TYPES, PictureSpec, decode_picture
from service.tasks.task import Task, TaskResult

DEFAULT_TOP_K = 5


class ImageClassificationSpec(PictureSpec):
    """What a manifest says about an image classifier."""

    labels: tuple[str, ...] = Field(min_length=1, description="Names of the classes, in the order of the logits.")


class ImageClassificationOptions(BaseModel):
    """What one request may ask of an image classifier."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top_k: int | None = Field(
        default=None,
        ge=1,
        description="How many classes to return, the most probable first; at most the model's number of classes. "
        f"By default {DEFAULT_TOP_K}, or all of them if there are fewer.",
        examples=[3],
    )


class Prediction(BaseModel):
    """One class and how probable it is."""

    label: str = Field(description="Name of the class.", examples=["cat"])
    index: int = Field(description="Index of the class among the model's classes.", examples=[3])
    score: float = Field(description="Probability of the class; all classes together have 1.", examples=[0.982])


class ImageClassificationResult(TaskResult):
    """The most probable classes of one picture."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "paca-vit-micro-cifar10",
                    "version": "1.0.0",
                    "predictions": [
                        {"label": "cat", "index": 3, "score": 0.982},
                        {"label": "dog", "index": 5, "score": 0.011},
                    ],
                }
            ]
        }
    )

    predictions: list[Prediction] = Field(description="The `top_k` most probable classes, most probable first.")


class ImageClassification(Task[ImageClassificationSpec, ImageClassificationOptions, ImageClassificationResult]):
    """A picture in, its most probable classes out."""

    name = "image-classification"
    media_types = PICTURE_MEDIA_TYPES
    Spec = ImageClassificationSpec
    Options = ImageClassificationOptions
    Result = ImageClassificationResult

    def check_options(self, options: ImageClassificationOptions, spec: ImageClassificationSpec) -> None:
        """Refuse a `top_k` above the number of classes.

        Raises: InvalidInput.
        """
        num_classes = len(spec.labels)
        if options.top_k is not None and options.top_k > num_classes:
            raise InvalidInput(
                f"top_k is {options.top_k}; this model has {num_classes} classes; ask for 1 to {num_classes} of them"
            )

    def outputs(
        self,
        options: ImageClassificationOptions,  # noqa: ARG002
        spec: ImageClassificationSpec,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Ask for the logits alone, whatever the options."""
        return ("logits",)

    def decode(
        self,
        body: bytes,
        media_type: str,  # noqa: ARG002
        spec: ImageClassificationSpec,
    ) -> Sample:
        """Decode a picture; its first bytes tell the format, whatever media type was named.

        Returns: `image`, uint8 (Y, X, 3).
        Raises: InvalidInput.
        """
        return Sample(inputs={"image": decode_picture(body, spec)}, length=1, context=None)

    def postprocess(
        self,
        outputs: Arrays,
        sample: Sample,  # noqa: ARG002
        spec: ImageClassificationSpec,
        options: ImageClassificationOptions,
        *,
        model: str,
        version: str,
    ) -> ImageClassificationResult:
        """Rank the classes; of equal logits the lower index comes first.

        Args:
            outputs: `logits`, (L,).
            sample, spec, options: as in `Task.postprocess`.
            model, version: as in `Task.postprocess`.
        Raises: ModelFailed if the logits are not one finite number per label.
        """
        logits = outputs["logits"].astype(np.float64)
        if logits.shape != (len(spec.labels),) or not np.isfinite(logits).all():
            raise ModelFailed(
                f"the model did not give a finite score to each of its {len(spec.labels)} classes, as it should; "
                "tell whoever runs this service"
            )
        weights = np.exp(logits - logits.max())
        scores = weights / weights.sum()
        top_k = min(DEFAULT_TOP_K, len(spec.labels)) if options.top_k is None else options.top_k
        ranking = np.argsort(-logits, kind="stable")[:top_k]
        return ImageClassificationResult(
            model=model,
            version=version,
            predictions=[
                Prediction(label=spec.labels[index], index=index, score=float(scores[index]))
                for index in ranking.tolist()
            ],
        )


IMAGE_CLASSIFICATION = ImageClassification()
