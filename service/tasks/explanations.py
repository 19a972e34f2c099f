"""Which clusters mattered for an answer, from a program's own outputs: shared by the tasks on pictures.

Of an answer that is one class; of a mask, `mask_explanations.py` tells it.

A model's clusters are of one of two kinds:

- Patch clusters (PaCa): each cluster gathers from all patches of a stage, `clusters_stage{i}` (C, N), rows sum to 1. A
  cluster matters as much as it gathers from patches that speak for the answer; see `weigh_clusters`.
- Token regions (TCFormer): each token is a region of the picture, `clusters_stage{i}` (N,): the token of each cell. A
  token's weight is its share of the cells: many small regions are where the model looks closely.

Source: ours; the evidence is a class activation map (Zhou et al. 2016, "Learning Deep Features for Discriminative
Localization"), taken against the class's rivals. It needs one pass and no gradients; how far it tells the truth is
measured by `python -m benchmarks explanations`.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from service.errors import ModelFailed
from service.sample import AnyArray, Arrays

EVIDENCE = "evidence"
NUM_SHOWN = 3  # clusters of a stage that an answer shows

Numbers = npt.NDArray[np.float64]
Regions = npt.NDArray[np.int64]


class ClusteredStage(BaseModel):
    """One stage of a model that tells its clusters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: int = Field(ge=1, description="Number of the stage; its output is `clusters_stage{stage}`.")
    grid: tuple[int, int] = Field(description="Rows and columns of the patches or cells that the output is about.")

    @property
    def output(self) -> str:
        """Name of the program's output."""
        return f"clusters_stage{self.stage}"


class ExplanationSpec(BaseModel):
    """What a manifest says about the clusters that can explain an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["patch_clusters", "token_regions"] = Field(
        description="Whether clusters gather from patches, or tokens are regions of the picture."
    )
    stages: tuple[ClusteredStage, ...] = Field(min_length=1, description="The stages with clusters, finest first.")

    @property
    def cluster_outputs(self) -> tuple[str, ...]:
        """Names of the program's outputs that tell the clusters: beside the logits, all that a mask needs."""
        return tuple(stage.output for stage in self.stages)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the program's outputs that the explanation of a class needs beside the logits."""
        return (EVIDENCE, *self.cluster_outputs) if self.kind == "patch_clusters" else self.cluster_outputs


class Cluster(NamedTuple):
    """One of the clusters that mattered most.

    Attributes:
        number: of the cluster in its stage, from 0.
        weight: share of the stage's evidence that it gathers, in [0, 1].
        heat: (Y, X) on the stage's grid, sums to 1: where that evidence lies.
        label: of a mask, the class that the evidence is for; None where the answer is one class.
    """

    number: int
    weight: float
    heat: Numbers
    label: str | None = None


class PatchClusters(NamedTuple):
    """A stage with patch clusters; `clusters` has at most `NUM_SHOWN`, the heaviest first."""

    stage: int
    grid: tuple[int, int]
    clusters: list[Cluster]


class TokenRegions(NamedTuple):
    """A stage whose tokens are regions.

    Attributes:
        regions: (Y, X) on the grid, the token of each cell, in [0, N).
        weights: (N,), share of each token in the cells that show the picture.
    """

    stage: int
    grid: tuple[int, int]
    regions: Regions
    weights: Numbers


Finding = PatchClusters | TokenRegions


def find_clusters(outputs: Arrays, spec: ExplanationSpec, *, target: int) -> list[Finding]:
    """Find what each stage's clusters say about an answer.

    Args:
        outputs: `logits` (L,) and those that the spec names.
        spec: of the model.
        target: the class to explain; of token regions it changes nothing.
    Raises: ModelFailed if an output has another shape or means nothing.
    """
    if spec.kind == "token_regions":
        return [find_regions(outputs[stage.output], stage) for stage in spec.stages]
    contrast = contrast_evidence(_check_evidence(outputs), outputs["logits"].astype(np.float64), target=target)
    findings: list[Finding] = []
    for stage in spec.stages:
        clusters = check_clusters(outputs[stage.output], stage)
        weights, heat = weigh_clusters(clusters, spread(contrast, stage.grid))
        ranking = np.argsort(-weights, kind="stable")[:NUM_SHOWN]
        shown = [Cluster(int(c), float(weights[c]), heat[c].reshape(stage.grid)) for c in ranking]
        findings.append(PatchClusters(stage.stage, stage.grid, shown))
    return findings


def contrast_evidence(evidence: Numbers, logits: Numbers, *, target: int) -> Numbers:
    """Tell how much each patch speaks for a class rather than for its rivals.

    Args:
        evidence: (L, Y, X), what each patch adds to each logit.
        logits: (L,).
        target: the class.
    Returns: (Y, X), the evidence for the class, less that for the others, each by its probability among the others.
    """
    own: Numbers = evidence[target]
    others = np.delete(np.arange(len(logits)), target)
    if not len(others):
        return own
    weights = np.exp(logits[others] - logits[others].max())
    rivals: Numbers = np.einsum("l,lyx->yx", weights / weights.sum(), evidence[others])
    return own - rivals


def spread(field: Numbers, grid: tuple[int, int]) -> Numbers:
    """Bring numbers (Y, X) to another grid, bilinearly."""
    image = Image.fromarray(field.astype(np.float32))
    brought: Numbers = np.asarray(image.resize(grid[::-1], Image.Resampling.BILINEAR)).astype(np.float64)
    return brought


def weigh_clusters(clusters: Numbers, contrast: Numbers) -> tuple[Numbers, Numbers]:
    """Weigh clusters by what they gather from the patches that speak for an answer.

    Args:
        clusters: (C, N), what part of each cluster comes from each patch.
        contrast: (Y, X), N = Y·X, how much each patch speaks for the answer; what speaks against it does not count.
    Returns: weights (C,), which sum to 1, and (C, N), where each cluster gathers them; rows sum to 1, or are 0 where a
        cluster gathers nothing that speaks for the answer.
    """
    speaking = contrast.ravel().clip(min=0)
    gathered = clusters * speaking if (clusters * speaking).any() else clusters  # no patch speaks for it: all count
    sums = gathered.sum(axis=1, keepdims=True)
    heat = np.divide(gathered, sums, out=np.zeros_like(gathered), where=sums > 0)
    return sums[:, 0] / sums.sum(), heat


def find_regions(cells: AnyArray, stage: ClusteredStage, *, part: tuple[float, float] = (1.0, 1.0)) -> TokenRegions:
    """Find the regions of a stage's tokens.

    Args:
        cells: (N,), the token of each cell.
        stage: whose cells they are.
        part: share of the rows and columns that show the picture, from the top left; tokens beyond do not count.
    Raises: ModelFailed if there is another number of cells.
    """
    height, width = stage.grid
    if cells.shape != (height * width,):
        raise _failed(f"the token of each of {height} x {width} cells of stage {stage.stage}")
    # What rounding adds to a share is no row.
    rows, columns = (math.ceil(size * share - 1e-9) for size, share in zip(stage.grid, part, strict=True))
    seen = cells.reshape(stage.grid)[:rows, :columns]
    _, tokens, sizes = np.unique(seen, return_inverse=True, return_counts=True)
    regions = np.zeros(stage.grid, np.int64)
    regions[:rows, :columns] = tokens.reshape(seen.shape)
    return TokenRegions(stage.stage, stage.grid, regions, sizes / seen.size)


def _check_evidence(outputs: Arrays) -> Numbers:
    evidence = outputs[EVIDENCE]
    num_classes = len(outputs["logits"])
    if evidence.ndim != 3 or len(evidence) != num_classes or not np.isfinite(evidence).all():
        raise _failed(f"a finite share of each patch in each of {num_classes} logits")
    return evidence.astype(np.float64)


def check_clusters(clusters: AnyArray, stage: ClusteredStage) -> Numbers:
    """Check what each cluster of a stage gathers from each patch.

    Raises: ModelFailed if the shape is not (C, N), a number is not finite or a cluster gathers nothing.
    """
    height, width = stage.grid
    if clusters.shape[1:] != (height * width,) or not np.isfinite(clusters).all() or not (clusters.sum(1) > 0).all():
        raise _failed(f"a finite share of each of {height} x {width} patches in each cluster of stage {stage.stage}")
    return clusters.astype(np.float64)


def _failed(expected: str) -> ModelFailed:
    return ModelFailed(f"the model did not give {expected}, as it should; tell whoever runs this service")
