"""Image classification: a picture in, its most probable classes out.

The program takes `image`, uint8 (Y, X, 3), RGB, and returns `logits`, (L,); it normalises the pixels itself. Of a model
that explains its answers it also returns what `explanations.py` names.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from service.errors import InvalidInput, ModelFailed, NotAcceptable
from service.sample import Arrays, Sample
from service.tasks.explanation_answers import Explanation, describe_clusters
from service.tasks.explanation_pictures import PANEL_PIXELS, SIDE_PIXELS, draw_sheet, read_canvas
from service.tasks.explanations import ExplanationSpec, find_clusters
from service.tasks.picture_files import PICTURE_MEDIA_TYPES
from service.tasks.pictures import PictureSpec, decode_picture
from service.tasks.task import Task, TaskResult

DEFAULT_TOP_K = 5


class ImageClassificationSpec(PictureSpec):
    """What a manifest says about an image classifier."""

    labels: tuple[str, ...] = Field(min_length=1, description="Names of the classes, in the order of the logits.")
    explanation: ExplanationSpec | None = Field(
        default=None, description="The clusters that can explain an answer; absent for a model that tells none."
    )


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
    explain: Literal["none", "clusters"] = Field(
        default="none",
        description="Whether to tell and draw the clusters that mattered for the most probable class.",
        examples=["clusters"],
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
    explanation: Explanation | None = Field(default=None, description="If `explain` is `clusters`.")


class ImageClassification(Task[ImageClassificationSpec, ImageClassificationOptions, ImageClassificationResult]):
    """A picture in, its most probable classes out."""

    name = "image-classification"
    media_types = PICTURE_MEDIA_TYPES
    Spec = ImageClassificationSpec
    Options = ImageClassificationOptions
    Result = ImageClassificationResult
    drawing = "The picture beside the clusters that mattered for the most probable class."

    def check_options(self, options: ImageClassificationOptions, spec: ImageClassificationSpec) -> None:
        """Refuse a `top_k` above the number of classes, and to explain where a model tells no clusters.

        Raises: InvalidInput.
        """
        num_classes = len(spec.labels)
        if options.top_k is not None and options.top_k > num_classes:
            raise InvalidInput(
                f"top_k is {options.top_k}; this model has {num_classes} classes; ask for 1 to {num_classes} of them"
            )
        if options.explain == "clusters" and spec.explanation is None:
            raise InvalidInput(
                "explain is clusters; this model tells no clusters; leave explain out or ask another model"
            )

    def check_drawing(
        self,
        options: ImageClassificationOptions,
        spec: ImageClassificationSpec,  # noqa: ARG002
    ) -> None:
        """Refuse to draw an answer that is not explained.

        Raises: NotAcceptable.
        """
        if options.explain != "clusters":
            raise NotAcceptable(
                "a picture is asked for; without explain=clusters there is nothing to show; add it, or accept "
                "application/json"
            )

    def outputs(self, options: ImageClassificationOptions, spec: ImageClassificationSpec) -> tuple[str, ...]:
        """Ask for the logits alone, unless the answer is explained."""
        if options.explain == "clusters" and spec.explanation is not None:
            return ("logits", *spec.explanation.outputs)
        return ("logits",)

    def decode(
        self,
        body: bytes,
        media_type: str,  # noqa: ARG002
        spec: ImageClassificationSpec,
    ) -> Sample:
        """Decode a picture; its first bytes tell the format, whatever media type was named.

        Returns: `image`, uint8 (Y, X, 3); context the body, which a drawing decodes again, of a model that explains.
        Raises: InvalidInput.
        """
        context = None if spec.explanation is None else body
        return Sample(inputs={"image": decode_picture(body, spec)}, length=1, context=context)

    def postprocess(
        self,
        outputs: Arrays,
        sample: Sample,
        spec: ImageClassificationSpec,
        options: ImageClassificationOptions,
        *,
        model: str,
        version: str,
    ) -> ImageClassificationResult:
        """Rank the classes; of equal logits the lower index comes first.

        Args:
            outputs: `logits`, (L,), and if the answer is explained what `explanations.py` needs.
            sample, spec, options: as in `Task.postprocess`.
            model, version: as in `Task.postprocess`.
        Raises: ModelFailed if the logits are not one finite number per label, or the clusters mean nothing.
        """
        scores, ranking = _rank(outputs, spec)
        top_k = min(DEFAULT_TOP_K, len(spec.labels)) if options.top_k is None else options.top_k
        explanation = None
        if options.explain == "clusters" and spec.explanation is not None:
            findings = find_clusters(outputs, spec.explanation, target=ranking[0])
            canvas = read_canvas(sample.context, spec, side=SIDE_PIXELS)
            explanation = Explanation(label=spec.labels[ranking[0]], stages=describe_clusters(canvas, findings))
        return ImageClassificationResult(
            model=model,
            version=version,
            predictions=[
                Prediction(label=spec.labels[index], index=index, score=float(scores[index]))
                for index in ranking[:top_k]
            ],
            explanation=explanation,
        )

    def draw(
        self,
        outputs: Arrays,
        sample: Sample,
        spec: ImageClassificationSpec,
        options: ImageClassificationOptions,  # noqa: ARG002
    ) -> bytes:
        """Draw the picture beside the clusters that mattered for the most probable class; a PNG.

        Args:
            outputs, sample, spec, options: as in `postprocess`, of an answer that is explained.
        Raises: ModelFailed, as `postprocess`.
        """
        assert spec.explanation is not None, "check_options refuses to explain what has no clusters"
        scores, ranking = _rank(outputs, spec)
        findings = find_clusters(outputs, spec.explanation, target=ranking[0])
        canvas = read_canvas(sample.context, spec, side=PANEL_PIXELS[spec.explanation.kind])
        title = f"{spec.labels[ranking[0]]}, probability {scores[ranking[0]]:.2f}"
        return draw_sheet(canvas, findings, title=title)


def _rank(outputs: Arrays, spec: ImageClassificationSpec) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Softmax of the logits, and the classes by falling logit.

    Raises: ModelFailed.
    """
    logits = outputs["logits"].astype(np.float64)
    if logits.shape != (len(spec.labels),) or not np.isfinite(logits).all():
        raise ModelFailed(
            f"the model did not give a finite score to each of its {len(spec.labels)} classes, as it should; "
            "tell whoever runs this service"
        )
    weights = np.exp(logits - logits.max())
    ranking: list[int] = np.argsort(-logits, kind="stable").tolist()
    return weights / weights.sum(), ranking


IMAGE_CLASSIFICATION = ImageClassification()
