"""Connectomes: what a model wants to know of brain regions, and how their time series become it.

Source: Dai et al. 2023 (THC), whose code takes arctanh of Pearson's correlations over all frames and sets the diagonal
to 0; Lanciano et al. 2020 for graphs of the strongest fifth of all edges.
Differs: a region without variance is no region of correlation 0; it has to be refused before.
"""

import math
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

MatrixKind = Literal["fisher_z", "correlation", "binary_graph"]
Values = npt.NDArray[np.float64]

MAX_REGIONS = 1_000


class ConnectomeSpec(BaseModel):
    """Which regions a model knows and what it wants to know of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    atlas: str = Field(min_length=1, description="Parcellation that the regions come from.", examples=["AAL-116"])
    regions: tuple[str, ...] = Field(
        min_length=2, max_length=MAX_REGIONS, description="Names of the regions, in the order of rows and columns."
    )
    matrix: MatrixKind = Field(description="What a connectivity must be and what a time series is turned into.")
    edge_density: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of all pairs of regions that a graph made from a time series has as edges; of binary graphs "
        "only.",
    )
    diagonal: Literal[0, 1] = Field(default=0, description="What a connectivity has on its diagonal.")
    tolerance: float = Field(
        default=1e-4,
        ge=0,
        lt=0.1,
        description="How far a connectivity may be from symmetric, from its diagonal and beyond ±1, as rounding makes "
        "it; what is within is put right.",
    )
    min_frames: int = Field(ge=3, description="Shortest time series that is taken.")
    max_frames: int = Field(default=10_000, description="Longest time series that is taken.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_frames < self.min_frames:
            raise ValueError(f"max_frames={self.max_frames} must be at least min_frames={self.min_frames}")
        if (self.edge_density is not None) != (self.matrix == "binary_graph"):
            raise ValueError(f"edge_density={self.edge_density} does not fit matrix={self.matrix}: graphs have one")
        if self.matrix == "fisher_z" and self.diagonal:
            raise ValueError("diagonal=1 does not fit matrix=fisher_z: z of a correlation of 1 is infinite")
        return self


def correlate(series: Values) -> Values:
    """Pearson's correlation of each pair of regions over all frames.

    Args:
        series: (T, R), no region constant, of any finite size.
    Returns: (R, R), symmetric to the bit, within ±1, 1 on the diagonal.
    """
    scaled = series / np.abs(series).max(axis=0)  # squares of very large or small numbers would not be finite
    centred = scaled - scaled.mean(axis=0)
    unit = centred / np.sqrt(np.square(centred).sum(axis=0))
    correlations: Values = (unit.T @ unit).clip(-1, 1)
    correlations = np.triu(correlations, 1)
    return correlations + correlations.T + np.eye(len(correlations))


def fisher_z(correlations: Values) -> Values:
    """Fisher's z, arctanh, of correlations (R, R); 0 on the diagonal."""
    off_diagonal = correlations.copy()
    np.fill_diagonal(off_diagonal, 0)
    return np.arctanh(off_diagonal)


def strongest_edges(correlations: Values, density: float) -> Values:
    """Graph of the pairs of regions with the highest correlations; negative ones are weak.

    Args:
        correlations: (R, R), symmetric.
        density: share of all pairs that become edges, rounded to a whole number of them.
    Returns: (R, R) of 0 and 1, 0 on the diagonal. Of equal correlations the pair with the lower first region, then the
        lower second one, is taken.
    """
    pairs = np.triu_indices(len(correlations), 1)
    strengths = correlations[pairs]
    num_edges = math.floor(density * len(strengths) + 0.5)
    strongest = np.argsort(-strengths, kind="stable")[:num_edges]
    graph = np.zeros_like(correlations)
    graph[pairs[0][strongest], pairs[1][strongest]] = 1
    return graph + graph.T
