"""Clustering of dynamic tokens inside parts of the picture, which nest from merge to merge.

Tokens of different parts never meet, so comparing all pairs costs 1 / parts as much. The first merge leaves its
clusters part by part, parts of a larger part beside each other, so that all later merges find theirs consecutive.

Source: unreleased code of TCFormer's first author (github.com/zengwang430521/mmpose, branch mywhole @c9ede5f),
`token_cluster_part_pad` and `token_cluster_part_follow`.
Differs: where padding stands "as far as any pair", pairs of the part are meant instead of those of the whole batch; it
only shows in the score of a padded part's densest token, which is the first center anyway.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from models.density_peaks import DensityPeaks, dpc_knn
from models.token_exchange import Grid

MAX_PART_PAIRS = 1 << 24  # pairs of tokens compared in one call; parts beyond that wait for the next


def fit_parts(parts: Sequence[Grid], cell_grid: Grid) -> tuple[Grid, ...]:
    """Give up the parts along a side with fewer cells than parts: nested (rows, columns) → the same number of them."""
    rows, columns = (cells >= most for cells, most in zip(cell_grid, parts[0], strict=True))
    return tuple((part[0] if rows else 1, part[1] if columns else 1) for part in parts)


def sort_by_part(fmap: Tensor, parts: Sequence[Grid]) -> Tensor:
    """Take a map apart, so that the tokens of a part are consecutive, and so are the parts of a larger part.

    Args:
        fmap: (B, Y, X, E), divisible by the finest parts.
        parts: rows and columns, nested, finest first.
    Returns: (B, number of finest parts, N, E), row-major in each part and among the parts of a larger one.
    """
    B, Y, X, E = fmap.shape
    rows, columns = _part_sizes((Y, X), parts)
    L = len(rows)
    split = fmap.reshape(B, *rows, *columns, E)
    order = [axis for row_axis in range(1, L + 1) for axis in (row_axis, row_axis + L)]
    return split.permute(0, *order, 2 * L + 1).reshape(B, parts[0][0] * parts[0][1], -1, E)


def unsort_by_part(x: Tensor, grid: Grid, parts: Sequence[Grid]) -> Tensor:
    """Undo `sort_by_part`: (B, parts, N, E) → (B, Y, X, E) on this grid."""
    B, E = x.shape[0], x.shape[3]
    rows, columns = _part_sizes(grid, parts)
    L = len(rows)
    split = x.reshape(B, *(size for pair in zip(rows, columns, strict=True) for size in pair), E)
    return split.permute(0, *range(1, 2 * L + 1, 2), *range(2, 2 * L + 1, 2), 2 * L + 1).reshape(B, *grid, E)


def _part_sizes(grid: Grid, parts: Sequence[Grid]) -> tuple[list[int], list[int]]:
    """For rows and for columns: number of the coarsest parts, of parts in each of these, …, of cells in the finest."""
    rows, columns = (
        [counts[-1], *(fine // coarse for coarse, fine in pairwise(reversed(counts))), cells // counts[0]]
        for counts, cells in zip(zip(*parts, strict=True), grid, strict=True)
    )
    return rows, columns


@dataclass(frozen=True, kw_only=True)
class LocalClustering:
    """DPC-KNN inside each part of the picture.

    Attributes:
        parts: rows and columns of the parts of all merges, nested, finest first.
        merge: which merge this is, from 0.
        sample_ratio: C over N, rounded to the same whole number for each part.
        num_neighbors: K.
    """

    parts: tuple[Grid, ...]
    merge: int
    sample_ratio: float
    num_neighbors: int

    @property
    def num_parts(self) -> int:
        """As in `Clustering`."""
        return self.parts[self.merge][0] * self.parts[self.merge][1]

    def __call__(self, x: Tensor, cell_grid: Grid) -> tuple[Tensor, int]:
        """As in `Clustering`; from the second merge on, tokens must stand as the first one left them."""
        parts = fit_parts(self.parts, cell_grid)
        num_parts = parts[self.merge][0] * parts[self.merge][1]
        per_part = math.ceil(x.shape[1] * self.sample_ratio) / num_parts
        if self.merge == 0:
            num_clusters = max(round(per_part), 1)
            clusters, _ = cluster_in_parts(
                x, cell_grid, parts, num_clusters=num_clusters, num_neighbors=self.num_neighbors
            )
        else:
            num_clusters = max(int(per_part), 1)
            clusters, _ = cluster_consecutive(x, num_parts, num_clusters=num_clusters, num_neighbors=self.num_neighbors)
        return clusters, num_clusters * num_parts


def cluster_in_parts(
    x: Tensor,
    grid: Grid,
    parts: Sequence[Grid],
    *,
    num_clusters: int,
    num_neighbors: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, DensityPeaks]:
    """Cluster the cells of a grid part by part.

    Sides that the parts do not divide are padded on both ends with tokens of zeros, which have no density but can be
    neighbours, as in the author's code.

    Args:
        x: (B, N, E), row-major on the grid.
        grid: (Y, X).
        parts: rows and columns, nested, finest first; the finest are clustered.
        num_clusters: C of each part.
        num_neighbors: K.
        noise: as in `dpc_knn`, (B · parts, tokens of a part), for parity only.
    Returns: clusters (B, N) int64, those of a part consecutive and parts as sorted by `sort_by_part`, and the peaks of
        (B · parts) samples.
    """
    rows, columns = parts[0]
    top, bottom = _padding(grid[0], rows)
    left, right = _padding(grid[1], columns)
    padded = (grid[0] + top + bottom, grid[1] + left + right)
    fmap = F.pad(x.detach().unflatten(1, grid), (0, 0, left, right, top, bottom))
    is_real = F.pad(x.new_ones(1, *grid, 1), (0, 0, left, right, top, bottom))
    sorted_x = sort_by_part(fmap, parts)  # (B, parts, tokens of a part, E)
    sorted_real = sort_by_part(is_real, parts).squeeze(-1).expand(sorted_x.shape[:3]) > 0
    peaks = _cluster_each(sorted_x, sorted_real, num_clusters=num_clusters, num_neighbors=num_neighbors, noise=noise)
    labels = _label(peaks.clusters, rows * columns, num_clusters)
    cells = unsort_by_part(labels[..., None], padded, parts)[:, top : top + grid[0], left : left + grid[1]]
    return cells.flatten(1), peaks


def cluster_consecutive(
    x: Tensor, num_parts: int, *, num_clusters: int, num_neighbors: int, noise: Tensor | None = None
) -> tuple[Tensor, DensityPeaks]:
    """Cluster tokens whose parts are consecutive and equally long: (B, N, E) → as `cluster_in_parts`."""
    parts = x.detach().unflatten(1, (num_parts, -1))
    peaks = _cluster_each(parts, None, num_clusters=num_clusters, num_neighbors=num_neighbors, noise=noise)
    return _label(peaks.clusters, num_parts, num_clusters).flatten(1), peaks


def _cluster_each(
    x: Tensor, is_real: Tensor | None, *, num_clusters: int, num_neighbors: int, noise: Tensor | None
) -> DensityPeaks:
    """Cluster each part, so many at a time that the pairs of their tokens stay few: (B, parts, N, E)."""
    B, num_parts, N, _ = x.shape
    at_once = min(max(MAX_PART_PAIRS // N**2, 1), num_parts)
    noise = None if noise is None else noise.unflatten(0, (B, num_parts))
    found = []
    for start in range(0, num_parts, at_once):
        part = slice(start, start + at_once)
        found.append(
            dpc_knn(
                x[:, part].flatten(0, 1),
                num_clusters=num_clusters,
                num_neighbors=num_neighbors,
                is_real=None if is_real is None else is_real[:, part].flatten(0, 1),
                noise=None if noise is None else noise[:, part].flatten(0, 1),
            )
        )
    joined = (
        torch.cat([tensor.unflatten(0, (B, -1)) for tensor in tensors], dim=1).flatten(0, 1)
        for tensors in zip(*found, strict=True)
    )
    return DensityPeaks(*joined)


def _padding(num_cells: int, num_parts: int) -> tuple[int, int]:
    missing = -num_cells % num_parts
    return missing // 2, missing - missing // 2


def _label(clusters: Tensor, num_parts: int, num_clusters: int) -> Tensor:
    """Number the clusters of all parts: (B · parts, N) in [0, C) → (B, parts, N) in [0, parts · C)."""
    firsts = torch.arange(num_parts, device=clusters.device)[:, None] * num_clusters
    return clusters.unflatten(0, (-1, num_parts)) + firsts
