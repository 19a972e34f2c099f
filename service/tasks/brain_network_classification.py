"""Brain-network classification: a connectome or the time series of its regions in, a class and its communities out.

The program takes `connectivity`, float32 (R, R), and returns `logits`, (L,), and for each level i from 1 that merges
its nodes `assignment_level{i}`, (N, C): the share of each of C communities in each node. The nodes of the first level
are the regions, N = R; those of the next are the communities before. A node's shares sum to 1, or to less where the
model keeps its strongest communities only.
"""

from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidInput, ModelFailed, NotAcceptable
from service.sample import Arrays, Sample
from service.tasks.brain_network_answers import (
    RESEARCH_NOTICE,
    BrainNetworkClassificationResult,
    Communities,
    Quality,
)
from service.tasks.connectome_formats import CONNECTOME_MEDIA_TYPES
from service.tasks.connectome_input import Connectome, decode_connectome
from service.tasks.connectome_picture import Drawing, draw_connectome
from service.tasks.connectomes import ConnectomeSpec
from service.tasks.embedded_picture import embed
from service.tasks.task import Task

_WEIGHT_DECIMALS = 6

Shares = npt.NDArray[np.float64]


class BrainNetworkClassificationSpec(ConnectomeSpec):
    """What a manifest says about a classifier of brain networks."""

    labels: tuple[str, ...] = Field(min_length=2, description="Names of the classes, in the order of the logits.")
    num_communities: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        description="Communities of each level that merges its nodes, the first level first; empty for a model that "
        "forms none."
    )
    notice: str = Field(default=RESEARCH_NOTICE, min_length=1, description="What every answer says about its use.")

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels must differ from each other: an answer names each class once")
        return self


class BrainNetworkClassificationOptions(BaseModel):
    """What one request may ask of a classifier of brain networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    explain: Literal["none", "communities"] = Field(
        default="none",
        description="Whether to draw the connectome, ordered by community, with the hierarchy beside it.",
        examples=["communities"],
    )
    weights: bool = Field(
        default=False, description="Whether to tell the share of each community in each region.", examples=[True]
    )


class BrainNetworkClassification(
    Task[BrainNetworkClassificationSpec, BrainNetworkClassificationOptions, BrainNetworkClassificationResult]
):
    """A connectome or its regions' time series in, a class and communities out; for research only."""

    name = "brain-network-classification"
    media_types = CONNECTOME_MEDIA_TYPES
    Spec = BrainNetworkClassificationSpec
    Options = BrainNetworkClassificationOptions
    Result = BrainNetworkClassificationResult
    drawing = "The connectome ordered by community, with the hierarchy beside it."

    def check_options(self, options: BrainNetworkClassificationOptions, spec: BrainNetworkClassificationSpec) -> None:
        """Refuse to explain or weigh what a model does not have.

        Raises: InvalidInput.
        """
        if not spec.num_communities and (options.explain == "communities" or options.weights):
            raise InvalidInput(
                "explain or weights asks for communities; this model forms none; leave both out or ask another model"
            )

    def check_drawing(
        self,
        options: BrainNetworkClassificationOptions,  # noqa: ARG002
        spec: BrainNetworkClassificationSpec,
    ) -> None:
        """Refuse to draw communities that a model does not have.

        Raises: NotAcceptable.
        """
        if not spec.num_communities:
            raise NotAcceptable(
                "a picture is asked for; this model forms no communities that it could show; accept application/json "
                "or ask another model"
            )

    def outputs(
        self,
        options: BrainNetworkClassificationOptions,  # noqa: ARG002
        spec: BrainNetworkClassificationSpec,
    ) -> tuple[str, ...]:
        """Ask for the logits and every level's assignment, whatever the options."""
        return ("logits", *(_output(level) for level in range(1, len(spec.num_communities) + 1)))

    def decode(self, body: bytes, media_type: str, spec: BrainNetworkClassificationSpec) -> Sample:
        """Decode a connectivity, or make one of a time series; the first bytes tell the format.

        Returns: `connectivity`, float32 (R, R); context the `Connectome`.
        Raises: InvalidInput.
        """
        connectome = decode_connectome(body, media_type, spec)
        return Sample({"connectivity": connectome.matrix}, length=1, context=connectome)

    def postprocess(
        self,
        outputs: Arrays,
        sample: Sample,
        spec: BrainNetworkClassificationSpec,
        options: BrainNetworkClassificationOptions,
        *,
        model: str,
        version: str,
    ) -> BrainNetworkClassificationResult:
        """Tell the class and, level by level, where each region belongs.

        Args:
            outputs: `logits`, (L,), and `assignment_level{i}`, (N, C).
            sample, spec, options: as in `Task.postprocess`.
            model, version: as in `Task.postprocess`.
        Raises: ModelFailed if an output has another shape or numbers that are not finite.
        """
        probabilities = _probabilities(outputs, spec)
        shares = _check_shares(outputs, spec)
        levels = _compose(shares)
        weights = _multiply(shares) if options.weights else [None] * len(shares)
        communities = [
            Communities(level=level, num_communities=size, assignment=assignment.tolist(), weights=weight)
            for level, (size, assignment, weight) in enumerate(
                zip(spec.num_communities, levels, weights, strict=True), 1
            )
        ]
        picture = None
        if options.explain == "communities":
            picture = embed(_draw(probabilities, levels, sample, spec))
        return BrainNetworkClassificationResult(
            model=model,
            version=version,
            label=max(probabilities, key=lambda label: probabilities[label]),
            probabilities=probabilities,
            communities=communities,
            quality=_describe(sample.context, spec),
            notice=spec.notice,
            picture=picture,
        )

    def draw(
        self,
        outputs: Arrays,
        sample: Sample,
        spec: BrainNetworkClassificationSpec,
        options: BrainNetworkClassificationOptions,  # noqa: ARG002
    ) -> bytes:
        """Draw the connectome ordered by community, with the hierarchy beside it, whatever the options; a PNG.

        Args:
            outputs, sample, spec, options: as in `postprocess`.
        Raises: ModelFailed, as `postprocess`.
        """
        return _draw(_probabilities(outputs, spec), _compose(_check_shares(outputs, spec)), sample, spec)


def _output(level: int) -> str:
    return f"assignment_level{level}"


def _probabilities(outputs: Arrays, spec: BrainNetworkClassificationSpec) -> dict[str, float]:
    """Softmax of the logits, by label; of equal ones the first is the most probable."""
    logits = outputs["logits"].astype(np.float64)
    if logits.shape != (len(spec.labels),) or not np.isfinite(logits).all():
        raise _failed(f"a finite score for each of its {len(spec.labels)} classes")
    weights = np.exp(logits - logits.max())
    return dict(zip(spec.labels, (weights / weights.sum()).tolist(), strict=True))


def _check_shares(outputs: Arrays, spec: BrainNetworkClassificationSpec) -> list[Shares]:
    """The assignments, (N, C) each.

    Raises: ModelFailed.
    """
    shares = []
    num_nodes = len(spec.regions)
    for level, size in enumerate(spec.num_communities, 1):
        assignment = outputs[_output(level)]
        if assignment.shape != (num_nodes, size) or not np.isfinite(assignment).all():
            raise _failed(f"a finite share of each of {size} communities in each of {num_nodes} nodes of level {level}")
        shares.append(assignment.astype(np.float64))
        num_nodes = size
    return shares


def _compose(shares: list[Shares]) -> list[npt.NDArray[np.int64]]:
    """The community of each region in each level, that of its community in the level before; ties go to the lower."""
    levels: list[npt.NDArray[np.int64]] = []
    for assignment in shares:
        strongest = assignment.argmax(axis=1)
        levels.append(strongest[levels[-1]] if levels else strongest)
    return levels


def _multiply(shares: list[Shares]) -> list[list[list[float]]]:
    weights: list[list[list[float]]] = []
    product: Shares | None = None
    for assignment in shares:
        product = assignment if product is None else product @ assignment
        weights.append(product.round(_WEIGHT_DECIMALS).tolist())
    return weights


def _describe(connectome: Connectome, spec: BrainNetworkClassificationSpec) -> Quality:
    density = None
    if spec.matrix == "binary_graph":
        density = float(connectome.matrix[np.triu_indices(len(connectome.matrix), 1)].mean())
    return Quality(
        source=connectome.source,
        matrix=spec.matrix,
        num_frames=connectome.num_frames,
        mean_absolute_correlation=connectome.mean_absolute_correlation,
        density=density,
        weakest_edge=connectome.weakest_edge,
    )


def _draw(
    probabilities: dict[str, float],
    levels: list[npt.NDArray[np.int64]],
    sample: Sample,
    spec: BrainNetworkClassificationSpec,
) -> bytes:
    label = max(probabilities, key=lambda label: probabilities[label])
    source = "connectivity" if sample.context.num_frames is None else f"{sample.context.num_frames} frames"
    sizes = " and ".join(str(len(np.unique(level))) for level in levels)
    return draw_connectome(
        Drawing(
            title=f"{label}, probability {probabilities[label]:.2f}",
            subtitle=f"{spec.atlas}, {len(spec.regions)} regions in {sizes} communities; from {source}",
            notice=spec.notice,
            matrix=sample.inputs["connectivity"],
            is_graph=spec.matrix == "binary_graph",
            regions=spec.regions,
            levels=[level.tolist() for level in levels],
        )
    )


def _failed(expected: str) -> ModelFailed:
    return ModelFailed(f"the model did not give {expected}, as it should; tell whoever runs this service")


BRAIN_NETWORK_CLASSIFICATION = BrainNetworkClassification()
