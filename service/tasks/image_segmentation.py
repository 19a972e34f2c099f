"""Image segmentation: a picture in, the class of each of its pixels out.

The program takes `image`, uint8 (Y, X, 3), RGB, and returns `logits`, float32 (L, Y/s, X/s) for a stride s; it
normalises the pixels itself. A picture of another shape is scaled to fit, see `letterbox.py`; the mask has the size of
the picture as sent. Of a model that explains its answers the program also returns its clusters, see `explanations.py`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidInput, ModelFailed, NotAcceptable
from service.sample import Arrays, Sample
from service.tasks.embedded_picture import embed
from service.tasks.explanation_answers import MaskExplanation, describe_clusters
from service.tasks.explanation_pictures import (
    MAX_SCENE_PIXELS,
    SCENE_PANEL_PIXELS,
    SIDE_PIXELS,
    draw_sheet,
    read_scene,
    shorten,
)
from service.tasks.explanations import ExplanationSpec, Finding
from service.tasks.letterbox import Colour, LetterboxSpec, Size, decode_letter, decode_to_fit
from service.tasks.mask_explanations import NUM_CLASSES_SHOWN, find_mask_clusters
from service.tasks.masks import Mask, count_pixels, count_runs, encode_mask, encode_painted_mask, find_mask
from service.tasks.palettes import MAX_COLOURS, make_palette
from service.tasks.picture_files import PICTURE_MEDIA_TYPES
from service.tasks.segmentation_answers import ImageSegmentationResult, RunLengths, SegmentedClass
from service.tasks.segmentation_picture import MAX_SIDE_PIXELS, Entry, blend, draw_segmentation, lay_out
from service.tasks.task import Task


class ImageSegmentationSpec(LetterboxSpec):
    """What a manifest says about an image segmenter."""

    labels: tuple[str, ...] = Field(
        min_length=2, max_length=MAX_COLOURS, description="Names of the classes, in the order of the logits."
    )
    colours: tuple[Colour, ...] | None = Field(
        default=None, description="Colour of each class in drawings; by default colours that differ much."
    )
    explanation: ExplanationSpec | None = Field(
        default=None, description="The clusters that can explain an answer; absent for a model that tells none."
    )

    @property
    def palette(self) -> tuple[Colour, ...]:
        """Colour of each class."""
        return make_palette(len(self.labels)) if self.colours is None else self.colours

    @model_validator(mode="after")
    def _check_colours(self) -> Self:
        if self.colours is not None and len(self.colours) != len(self.labels):
            raise ValueError(f"there are {len(self.colours)} colours for {len(self.labels)} labels; name one for each")
        return self


class ImageSegmentationOptions(BaseModel):
    """What one request may ask of an image segmenter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mask_format: Literal["png", "rle"] = Field(
        default="png",
        description="How JSON holds the mask: as a PNG whose grey values are classes, or as run lengths of each class.",
        examples=["rle"],
    )
    overlay: bool = Field(
        default=False,
        description="Whether to draw the picture blended with a colour for each class, with a legend; its longer side "
        f"has at most {MAX_SIDE_PIXELS} pixels.",
        examples=[True],
    )
    explain: Literal["none", "clusters"] = Field(
        default="none",
        description="Whether to tell and draw the clusters that mattered for the largest classes of the mask.",
        examples=["clusters"],
    )


class _Sent(NamedTuple):
    """What is known of a picture: its file, as drawings decode it again, its size, and the box that it lay in."""

    body: bytes
    size: Size
    box: Size


class ImageSegmentation(Task[ImageSegmentationSpec, ImageSegmentationOptions, ImageSegmentationResult]):
    """A picture in, the class of each of its pixels out."""

    name = "image-segmentation"
    media_types = PICTURE_MEDIA_TYPES
    Spec = ImageSegmentationSpec
    Options = ImageSegmentationOptions
    Result = ImageSegmentationResult
    drawing = (
        "The mask, its pixels being classes that a palette gives colours; with `overlay` the picture, blended; with "
        "`explain` the answer beside the clusters that mattered for it."
    )

    def check_options(self, options: ImageSegmentationOptions, spec: ImageSegmentationSpec) -> None:
        """Refuse to explain where a model tells no clusters.

        Raises: InvalidInput.
        """
        if options.explain == "clusters" and spec.explanation is None:
            raise InvalidInput(
                "explain is clusters; this model tells no clusters; leave explain out or ask another model"
            )

    def check_drawing(
        self,
        options: ImageSegmentationOptions,
        spec: ImageSegmentationSpec,  # noqa: ARG002
    ) -> None:
        """Refuse to draw run lengths, and two pictures at once.

        Raises: NotAcceptable.
        """
        is_explained = options.explain == "clusters"
        if options.overlay and is_explained:
            raise NotAcceptable(
                "overlay and explain are both asked for, and so is a picture; it can show one of them; leave one out "
                "or accept application/json"
            )
        if options.mask_format == "rle" and not options.overlay and not is_explained:
            raise NotAcceptable(
                "mask_format is rle, and a picture is asked for; run lengths are no picture; leave mask_format out or "
                "accept application/json"
            )

    def outputs(self, options: ImageSegmentationOptions, spec: ImageSegmentationSpec) -> tuple[str, ...]:
        """Ask for the logits alone, unless the answer is explained."""
        if options.explain == "clusters" and spec.explanation is not None:
            return ("logits", *spec.explanation.cluster_outputs)
        return ("logits",)

    def decode(
        self,
        body: bytes,
        media_type: str,  # noqa: ARG002
        spec: ImageSegmentationSpec,
    ) -> Sample:
        """Decode a picture; its first bytes tell the format, whatever media type was named.

        Returns: `image`, uint8 (Y, X, 3).
        Raises: InvalidInput.
        """
        letter = decode_letter(body, spec)
        return Sample(inputs={"image": letter.pixels}, length=1, context=_Sent(body, letter.size, letter.box))

    def postprocess(
        self,
        outputs: Arrays,
        sample: Sample,
        spec: ImageSegmentationSpec,
        options: ImageSegmentationOptions,
        *,
        model: str,
        version: str,
    ) -> ImageSegmentationResult:
        """Find the class of each pixel; of equal logits the lower index wins.

        Args:
            outputs: `logits`, (L, Y/s, X/s), and if the answer is explained its clusters.
            sample, spec, options: as in `Task.postprocess`.
            model, version: as in `Task.postprocess`.
        Raises: ModelFailed if the logits are not one finite number per label and cell, or the clusters mean nothing.
        """
        mask = _find_mask(outputs, sample, spec)
        classes = _count_classes(mask, spec)
        explanation = None
        if options.explain == "clusters":
            findings = _find_clusters(outputs, classes, sample, spec)
            side = min(max(SIDE_PIXELS, *sample.context.size), MAX_SCENE_PIXELS)
            canvas = read_scene(sample.context.body, spec, sample.context.box, side=side)
            explanation = MaskExplanation(stages=describe_clusters(canvas, findings))
        return ImageSegmentationResult(
            model=model,
            version=version,
            height=mask.shape[0],
            width=mask.shape[1],
            classes=classes,
            mask=embed(encode_mask(mask)) if options.mask_format == "png" else _count_runs(mask, classes),
            overlay=embed(_draw_overlay(mask, classes, sample, spec)) if options.overlay else None,
            explanation=explanation,
        )

    def draw(
        self, outputs: Arrays, sample: Sample, spec: ImageSegmentationSpec, options: ImageSegmentationOptions
    ) -> bytes:
        """Draw the mask with a palette, the picture blended with its colours, or beside what explains them.

        Args:
            outputs, sample, spec, options: as in `postprocess`.
        Raises: ModelFailed, as `postprocess`.
        """
        mask = _find_mask(outputs, sample, spec)
        if options.explain == "clusters":
            return _draw_explanation(outputs, mask, sample, spec)
        if options.overlay:
            return _draw_overlay(mask, _count_classes(mask, spec), sample, spec)
        return encode_painted_mask(mask, spec.palette)


def _find_mask(outputs: Arrays, sample: Sample, spec: ImageSegmentationSpec) -> Mask:
    logits = outputs["logits"]
    is_grid = logits.ndim == 3 and logits.size > 0 and len(logits) == len(spec.labels)
    if not is_grid or not np.isfinite(logits).all():
        raise ModelFailed(
            f"the model did not give a finite score to each of its {len(spec.labels)} classes everywhere, as it "
            "should; tell whoever runs this service"
        )
    box = sample.context.box
    extent = (box[0] * logits.shape[1] / spec.height, box[1] * logits.shape[2] / spec.width)
    return find_mask(logits, extent, sample.context.size)


def _count_classes(mask: Mask, spec: ImageSegmentationSpec) -> list[SegmentedClass]:
    counts = count_pixels(mask, len(spec.labels))
    ranking = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return [
        SegmentedClass(index=index, label=spec.labels[index], share=int(counts[index]) / mask.size)
        for index in ranking.tolist()
    ]


def _count_runs(mask: Mask, classes: list[SegmentedClass]) -> RunLengths:
    indices = sorted(one.index for one in classes)
    height, width = mask.shape
    return RunLengths(size=(height, width), counts=dict(zip(indices, count_runs(mask, indices), strict=True)))


def _draw_overlay(mask: Mask, classes: list[SegmentedClass], sample: Sample, spec: ImageSegmentationSpec) -> bytes:
    palette = spec.palette
    entries = [Entry(one.label, palette[one.index], one.share) for one in classes]
    layout = lay_out(sample.context.size, entries)
    pixels = decode_to_fit(sample.context.body, layout.limit, max_pixels=spec.max_pixels)
    return draw_segmentation(pixels, mask, palette, entries, layout)


def _find_clusters(
    outputs: Arrays, classes: Sequence[SegmentedClass], sample: Sample, spec: ImageSegmentationSpec
) -> list[Finding]:
    assert spec.explanation is not None, "check_options refuses to explain what has no clusters"
    box = sample.context.box
    return find_mask_clusters(
        outputs,
        spec.explanation,
        part=(box[0] / spec.height, box[1] / spec.width),
        targets={one.index: one.label for one in classes[:NUM_CLASSES_SHOWN]},
    )


def _draw_explanation(outputs: Arrays, mask: Mask, sample: Sample, spec: ImageSegmentationSpec) -> bytes:
    classes = _count_classes(mask, spec)
    findings = _find_clusters(outputs, classes, sample, spec)
    canvas = read_scene(sample.context.body, spec, sample.context.box, side=SCENE_PANEL_PIXELS)
    title = ", ".join(f"{shorten(one.label)} {one.share:.0%}" for one in classes[:NUM_CLASSES_SHOWN])
    return draw_sheet(canvas, findings, title=title, answer=blend(canvas.pixels, mask, spec.palette))


IMAGE_SEGMENTATION = ImageSegmentation()
