"""The operator `clustered_attention::ClusteredAttention`, query by query in float64.

Written from the operator's contract: Vyas et al. 2020 with initial centroids spread over the real queries, ties to the
lowest index, a tied bit to 0, and an empty cluster that keeps its centroid. Queries of a short sample
are in cluster -1.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def clustered_attention_operator(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    planes: npt.ArrayLike,
    query_lengths: npt.NDArray[np.int64],
    key_lengths: npt.NDArray[np.int64],
    *,
    num_clusters: int,
    num_iterations: int,
    top_k: int,
    scale: float,
    metric: Literal["lsh", "l2"],
    full_below: int,
) -> tuple[Array, npt.NDArray[np.int32]]:
    """Inputs and outputs as those of the operator: (B, H, N, D) and (B, H, N)."""
    q, k, v, planes = (np.asarray(x, np.float64) for x in (q, k, v, planes))
    B, H, N, _ = q.shape
    out = np.zeros((B, H, N, v.shape[3]))
    clusters = np.full((B, H, N), num_clusters, np.int32)
    for b, h in np.ndindex(B, H):
        n, s = int(query_lengths[b]), int(key_lengths[b])
        queries, keys, values = q[b, h, :n], k[b, h, :s], v[b, h, :s]
        if n == 0:
            continue
        is_short = n < full_below and s < full_below
        points = sign_bits(queries, planes) if metric == "lsh" else queries
        if is_short:
            clusters[b, h, :n] = -1
        else:
            clusters[b, h, :n] = lloyd(points, num_clusters, num_iterations, is_binary=metric == "lsh")
        if s == 0:
            continue
        for i in range(n):
            if is_short:
                out[b, h, i] = softmax(scale * keys @ queries[i]) @ values
            else:
                mean = queries[clusters[b, h, :n] == clusters[b, h, i]].mean(axis=0)
                out[b, h, i] = attend(queries[i], mean, keys, values, top_k=top_k, scale=scale)
    return out, clusters


def sign_bits(queries: Array, planes: Array) -> Array:
    """(N, E), (P, E + 1) → (N, P) of 0 and 1."""
    return np.array([[float(query @ plane[:-1] > plane[-1]) for plane in planes] for query in queries])


def lloyd(points: Array, num_clusters: int, num_iterations: int, *, is_binary: bool) -> npt.NDArray[np.int64]:
    """Cluster of each point; of bits the squared distance is that of Hamming."""
    centroids = points[[c * len(points) // num_clusters for c in range(num_clusters)]].copy()
    for _ in range(num_iterations - 1):
        clusters = nearest(points, centroids)
        for c in range(num_clusters):
            members = points[clusters == c]
            if len(members):
                middle = members.mean(axis=0)
                centroids[c] = middle > 0.5 if is_binary else middle
    return nearest(points, centroids)


def nearest(points: Array, centroids: Array) -> npt.NDArray[np.int64]:
    """The first of equally near centroids."""
    return np.array([np.argmin(((point - centroids) ** 2).sum(axis=1)) for point in points])


def attend(query: Array, mean: Array, keys: Array, values: Array, *, top_k: int, scale: float) -> Array:
    """Attention of one query in a cluster with this mean."""
    scores = keys @ mean
    of_cluster = softmax(scale * scores)
    if top_k == 0:
        return of_cluster @ values
    kept = np.argsort(-scores, kind="stable")[:top_k]
    rest = np.setdiff1d(np.arange(len(keys)), kept)
    mass = of_cluster[rest].sum()
    own = softmax(scale * keys[kept] @ query) * (1 - mass)
    out: Array = own @ values[kept] + of_cluster[rest] @ values[rest]
    return out


def softmax(scores: Array) -> Array:
    weights: Array = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights
