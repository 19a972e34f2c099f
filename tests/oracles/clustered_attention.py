"""Clustered attention, one number at a time in float64, for a single sample and head without padding.

Written from Vyas et al. 2020: Lloyd's algorithm on sign bits or on vectors, clustered and improved clustered attention;
the causal variant from the description of the official one.
"""

from collections.abc import Sequence
from math import exp

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def sign_bits(q: Array, planes: Array) -> list[tuple[int, ...]]:
    """q: (N, E), planes: (P, E + 1) → N tuples of P bits."""
    return [tuple(int(dot(query, plane[:-1]) > plane[-1]) for plane in planes) for query in q]


def cluster_bits(bits: Sequence[tuple[int, ...]], *, num_clusters: int, num_iterations: int) -> list[int]:
    """Cluster of each token by Hamming distance."""
    centroids = [bits[c * len(bits) // num_clusters] for c in range(num_clusters)]

    def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        return sum(x != y for x, y in zip(a, b, strict=True))

    for _ in range(num_iterations - 1):
        clusters = [nearest([distance(token, centroid) for centroid in centroids]) for token in bits]
        for c in range(num_clusters):
            members = [token for token, cluster in zip(bits, clusters, strict=True) if cluster == c]
            if members:
                centroids[c] = tuple(int(2 * sum(column) > len(members)) for column in zip(*members, strict=True))
    return [nearest([distance(token, centroid) for centroid in centroids]) for token in bits]


def cluster_vectors(q: Array, *, num_clusters: int, num_iterations: int) -> list[int]:
    """Cluster of each query (N, E) by Euclidean distance."""
    centroids = [q[c * len(q) // num_clusters] for c in range(num_clusters)]
    for _ in range(num_iterations - 1):
        clusters = [nearest([dot(query - centroid, query - centroid) for centroid in centroids]) for query in q]
        for c in range(num_clusters):
            members = [query for query, cluster in zip(q, clusters, strict=True) if cluster == c]
            if members:
                centroids[c] = sum(members) / len(members)
    return [nearest([dot(query - centroid, query - centroid) for centroid in centroids]) for query in q]


def nearest(distances: Sequence[float]) -> int:
    best = 0
    for c, distance in enumerate(distances):
        if distance < distances[best]:
            best = c
    return best


def full_attention(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """q: (N, E), k: (S, E), v: (S, D) → (N, D)."""
    out = np.zeros((len(q), v.shape[1]))
    for i, query in enumerate(q):
        for s, weight in enumerate(softmax([scale * dot(query, key) for key in k])):
            out[i] += weight * v[s]
    return out


def clustered_attention(q: Array, k: Array, v: Array, clusters: Sequence[int], *, scale: float) -> Array:
    """Every query gets what the mean query of its cluster attends to."""
    out = np.zeros((len(q), v.shape[1]))
    for i, cluster in enumerate(clusters):
        for s, weight in enumerate(softmax([scale * score for score in mean_scores(q, k, clusters, cluster)])):
            out[i] += weight * v[s]
    return out


def improved_clustered_attention(
    q: Array, k: Array, v: Array, clusters: Sequence[int], *, top_k: int, scale: float
) -> Array:
    """The cluster's weights, but those of its strongest keys shared out anew by each query."""
    out = np.zeros((len(q), v.shape[1]))
    for i, cluster in enumerate(clusters):
        scores = mean_scores(q, k, clusters, cluster)
        kept = strongest(scores, top_k)
        of_cluster = softmax([scale * score for score in scores])
        kept_mass = sum(of_cluster[s] for s in kept)
        for s in range(len(k)):
            if s not in kept:
                out[i] += of_cluster[s] * v[s]
        for s, weight in zip(kept, softmax([scale * dot(q[i], k[s]) for s in kept]), strict=True):
            out[i] += kept_mass * weight * v[s]
    return out


def causal_improved_clustered_attention(
    q: Array, k: Array, v: Array, clusters: Sequence[int], *, top_k: int, scale: float
) -> Array:
    """Only the cluster's strongest keys, and of those only what is not later than the query."""
    out = np.zeros((len(q), v.shape[1]))
    for i, cluster in enumerate(clusters):
        seen = [s for s in strongest(mean_scores(q, k, clusters, cluster), top_k) if s <= i]
        for s, weight in zip(seen, softmax([scale * dot(q[i], k[s]) for s in seen]), strict=True):
            out[i] += weight * v[s]
    return out


def mean_scores(q: Array, k: Array, clusters: Sequence[int], cluster: int) -> list[float]:
    members = [query for query, other in zip(q, clusters, strict=True) if other == cluster]
    mean = sum(members) / len(members)
    return [dot(mean, key) for key in k]


def strongest(scores: Sequence[float], top_k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda s: -scores[s])[:top_k]


def softmax(numbers: Sequence[float]) -> list[float]:
    if not numbers:
        return []
    weights = [exp(number - max(numbers)) for number in numbers]
    return [weight / sum(weights) for weight in weights]


def dot(a: Array, b: Array) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
