"""Patch-to-cluster attention, one number at a time in float64.

Written from Grainger et al. 2023 (patch-to-cluster attention) and Vaswani et al. 2017 (multi-head attention): queries
are patches, keys and values are clusters, a cluster is the normalised weighted mean of the patches.
"""

from collections.abc import Mapping
from math import exp, sqrt

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def softmax(numbers: list[float]) -> list[float]:
    weights = [exp(number - max(numbers)) for number in numbers]
    return [weight / sum(weights) for weight in weights]


def soft_assignment(scores: Array) -> Array:
    """scores: (B, N, C) → (B, C, N): for each cluster, a softmax over the patches."""
    B, N, C = scores.shape
    assignment = np.zeros((B, C, N))
    for b in range(B):
        for c in range(C):
            assignment[b, c] = softmax([scores[b, n, c] for n in range(N)])
    return assignment


def attention(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """q: (B, H, N, D), k and v: (B, H, S, D) → (B, H, N, D) and the weights (B, H, N, S)."""
    B, H, N, D = q.shape
    S = k.shape[2]
    out, weights = np.zeros((B, H, N, D)), np.zeros((B, H, N, S))
    for b, h, n in np.ndindex(B, H, N):
        products = [sum(q[b, h, n, d] * k[b, h, s, d] for d in range(D)) / sqrt(D) for s in range(S)]
        weights[b, h, n] = softmax(products)
        for d in range(D):
            out[b, h, n, d] = sum(weights[b, h, n, s] * v[b, h, s, d] for s in range(S))
    return out, weights


def layer_norm(vector: Array, weight: Array, bias: Array, *, eps: float) -> Array:
    mean = sum(vector) / len(vector)
    variance = sum((number - mean) ** 2 for number in vector) / len(vector)
    return np.array(
        [(number - mean) / sqrt(variance + eps) * w + b for number, w, b in zip(vector, weight, bias, strict=True)]
    )


def patch_to_cluster_attention(
    x: Array, assignment: Array | None, parameters: Mapping[str, Array], *, num_heads: int, eps: float
) -> Array:
    """One attention layer.

    Args:
        x: (B, N, E) patches.
        assignment: (B, C, N), or None for attention between patches.
        parameters: `{q,k,v,proj}.{weight,bias}` and, with an assignment, `cluster_norm.{weight,bias}`.
        num_heads: head h owns the features h·D to (h + 1)·D.
        eps: of the norm on the clusters.
    Returns: (B, N, E).
    """
    B, N, E = x.shape
    D = E // num_heads

    def linear(name: str, vector: Array) -> Array:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return np.array([sum(weight[o, i] * vector[i] for i in range(E)) + bias[o] for o in range(E)])

    def split(vectors: list[Array]) -> Array:
        heads = np.zeros((1, num_heads, len(vectors), D))
        for h, n, d in np.ndindex(num_heads, len(vectors), D):
            heads[0, h, n, d] = vectors[n][h * D + d]
        return heads

    out = np.zeros((B, N, E))
    for b in range(B):
        patches = [x[b, n] for n in range(N)]
        source = patches
        if assignment is not None:
            norm = parameters["cluster_norm.weight"], parameters["cluster_norm.bias"]
            means = [sum(share * patch for share, patch in zip(row, patches, strict=True)) for row in assignment[b]]
            source = [layer_norm(mean, *norm, eps=eps) for mean in means]
        q = split([linear("q", patch) for patch in patches])
        k = split([linear("k", item) for item in source])
        v = split([linear("v", item) for item in source])
        attended, _ = attention(q, k, v)
        for n in range(N):
            out[b, n] = linear("proj", np.concatenate([attended[0, h, n] for h in range(num_heads)]))
    return out
