"""Dynamic tokens, one number at a time in float64.

Written from Zeng et al. 2022 (TCFormer), section 3.2: density peaks by nearest neighbours, weighted merging, and the
exchange with maps through the cells that a token and a map cell share.
"""

from math import exp, sqrt

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def dpc_knn(x: Floats, *, num_clusters: int, num_neighbors: int) -> tuple[list[int], list[int]]:
    """x: (N, E) → cluster of each token and the token in the middle of each cluster; ties go to the lower index."""
    N, E = x.shape
    distances = [[sqrt(sum((x[i, e] - x[j, e]) ** 2 for e in range(E)) / E) for j in range(N)] for i in range(N)]
    farthest = max(max(row) for row in distances)
    density = [exp(-sum(d * d for d in sorted(row)[:num_neighbors]) / num_neighbors) for row in distances]
    score = []
    for i in range(N):
        to_denser = [distances[i][j] for j in range(N) if density[j] > density[i]]
        score.append(density[i] * min(to_denser, default=farthest))
    centers = sorted(range(N), key=lambda i: (-score[i], i))[:num_clusters]
    clusters = [min(range(num_clusters), key=lambda c: (distances[centers[c]][i], c)) for i in range(N)]
    for c, center in enumerate(centers):
        clusters[center] = c
    return clusters, centers


def merge(x: Floats, weights: Floats, clusters: Ints, *, num_clusters: int) -> tuple[Floats, Floats]:
    """x: (N, E), weights and clusters: (N,) → merged tokens (C, E) and the share of each token in its cluster (N,)."""
    totals = [sum(w for w, k in zip(weights, clusters, strict=True) if k == c) + 1e-6 for c in range(num_clusters)]
    shares = np.array([w / totals[k] for w, k in zip(weights, clusters, strict=True)])
    merged = np.zeros((num_clusters, x.shape[1]))
    for token, share, k in zip(x, shares, clusters, strict=True):
        merged[k] += share * token
    return merged, shares


def grid_index(cell_grid: tuple[int, int], grid: tuple[int, int]) -> list[int]:
    """Map cell of each cell, row by row."""
    return [
        (i * grid[0] // cell_grid[0]) * grid[1] + j * grid[1] // cell_grid[1]
        for i in range(cell_grid[0])
        for j in range(cell_grid[1])
    ]


def carry(x: Floats, source_of_cell: list[int], target_of_cell: list[int], weights: Floats, *, num: int) -> Floats:
    """x: (S, E) → (num, E): each target is the weighted mean over its cells of what their sources hold."""
    sums, totals = np.zeros((num, x.shape[1])), np.full(num, 1e-6)
    for source, target, weight in zip(source_of_cell, target_of_cell, weights, strict=True):
        sums[target] += weight * x[source]
        totals[target] += weight
    return sums / totals[:, None]
