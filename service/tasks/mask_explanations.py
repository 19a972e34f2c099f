"""Which clusters mattered for a mask, from a program's own outputs.

A mask is as many answers as it has classes, so each of its largest classes is explained by itself. The score of a class
is the sum of its logits over the cells that it won; each cell's share in it is known exactly, as it is the cell's own
logit. From there on it is as with one class, see `explanations.py`: evidence is taken against the rivals, and a cluster
matters as much as it gathers from patches with evidence.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from service.sample import AnyArray, Arrays
from service.tasks.explanations import (
    Cluster,
    ExplanationSpec,
    Finding,
    Numbers,
    PatchClusters,
    check_clusters,
    find_regions,
    spread,
    weigh_clusters,
)

NUM_CLASSES_SHOWN = 4  # of a mask, the largest


def find_mask_clusters(
    outputs: Arrays, spec: ExplanationSpec, *, part: tuple[float, float], targets: Mapping[int, str]
) -> list[Finding]:
    """Find, for each stage, the cluster that mattered most for each of some classes.

    Args:
        outputs: `logits` (L, Y, X), finite, L at least 2, and those that tell the clusters.
        spec: of the model.
        part: share of the rows and columns of the grids that show the picture, from the top left.
        targets: index and label of the classes to explain; of token regions they change nothing.
    Raises: ModelFailed if clusters have another shape or mean nothing.
    """
    if spec.kind == "token_regions":
        return [find_regions(outputs[stage.output], stage, part=part) for stage in spec.stages]
    winners, margins = measure_margins(outputs["logits"], part=part)
    findings: list[Finding] = []
    for stage in spec.stages:
        clusters = check_clusters(outputs[stage.output], stage)
        shown = []
        for target, label in targets.items():
            weights, heat = weigh_clusters(clusters, spread(np.where(winners == target, margins, 0.0), stage.grid))
            heaviest = int(weights.argmax())
            shown.append(Cluster(heaviest, float(weights[heaviest]), heat[heaviest].reshape(stage.grid), label))
        findings.append(PatchClusters(stage.stage, stage.grid, shown))
    return findings


def measure_margins(logits: AnyArray, *, part: tuple[float, float]) -> tuple[npt.NDArray[np.int64], Numbers]:
    """Measure how clearly each cell is of its class.

    Args:
        logits: (L, Y, X), L at least 2.
        part: as in `find_mask_clusters`; a cell that shows the picture in part counts in part, one beyond it not.
    Returns: (Y, X), the class with the highest logit, of equal ones the lowest; and (Y, X), not negative, that logit
        less the others, each of these by its probability among the others.
    """
    scores = logits.astype(np.float64)
    winners = scores.argmax(axis=0)
    rivals = scores.copy()
    np.put_along_axis(rivals, winners[np.newaxis], -np.inf, axis=0)
    weights = np.exp(rivals - rivals.max(axis=0))
    margins = scores.max(axis=0) - (weights * scores).sum(axis=0) / weights.sum(axis=0)
    rows, columns = (_cover(size, share) for size, share in zip(scores.shape[1:], part, strict=True))
    return winners, margins * rows[:, np.newaxis] * columns


def _cover(size: int, share: float) -> Numbers:
    """Share of each of some rows of cells that shows the picture."""
    covered: Numbers = (size * share - np.arange(size)).clip(0, 1)
    return covered
