"""Clustering of tokens as pure functions, in two kinds.

Hard: every query belongs to one cluster, found by Lloyd's algorithm on sign bits of random projections ("lsh") or on
the queries themselves ("l2"). Soft: every token has a share in every cluster, so that the assignment is differentiable.

Source: Vyas et al. 2020, "Fast Transformers with Clustered Attention", and its official code
(github.com/idiap/fast-transformers @2ad36b9) for the hard kind; Grainger et al. 2023 (PaCa-ViT) for the soft kind.
Deliberately absent: gradients through the hard kind; bits packed into integers, as ±1 floats give the same distances by
one matrix product, which every runtime has; stopping when nothing changes any more.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Metric = Literal["lsh", "l2"]
FAR = 1e15  # a coordinate that no query has and whose square is still finite in float32


def soft_assignment(scores: Tensor) -> Tensor:
    """Turn clustering scores into one spatial distribution per cluster.

    Args:
        scores: (B, N, C).
    Returns: (B, C, N); each row sums to 1 over the tokens, so a token's shares need not.
    Source: Grainger et al. 2023, patch-to-cluster assignment, as in the official code (github.com/iVMCL/PaCaViT).
    """
    return scores.transpose(1, 2).softmax(dim=-1)


def cluster_queries(
    q: Tensor, planes: Tensor, lengths: Tensor, *, num_clusters: int, num_iterations: int, metric: Metric
) -> Tensor:
    """Assign every query to a cluster of its own sample and head.

    Args:
        q: (B, H, N, E), N ≥ 1.
        planes: (P, E + 1) as in `hash_bits`; not looked at with "l2".
        lengths: (B,) int64, how many tokens of each sample are real.
        num_clusters: C.
        num_iterations: assignments; the centroids move between them.
        metric: "lsh", Hamming distance of the bits, or "l2", Euclidean distance of the queries.
    Returns: (B, H, N) int64, in [0, C) and C for padding; carries no gradient.
    Differs: the initial centroids are spread evenly over the real tokens (official: random tokens, padding included).
    """
    is_real = torch.arange(q.shape[2], device=q.device) < lengths[:, None]  # (B, N)
    points = hash_bits(q, planes) if metric == "lsh" else q.detach().float()
    points = points.masked_fill(~is_real[:, None, :, None], 0)  # whatever padding holds, 0 · NaN included
    positions = spread_positions(lengths, num_clusters)[:, None].expand(-1, q.shape[1], -1)  # (B, H, C)
    centroids = take_rows(points, positions)
    if metric == "l2":  # rounding, not the tie rule, would decide between twins: put all but the first out of reach
        is_twin = F.pad(positions[:, :, 1:] == positions[:, :, :-1], (1, 0))
        centroids = centroids.masked_fill(is_twin[..., None], FAR)
    return lloyd(points, centroids, is_real, num_iterations=num_iterations, metric=metric)[0]


def hash_bits(q: Tensor, planes: Tensor) -> Tensor:
    """Tell on which side of each hyperplane a query lies.

    Always in float32, under autocast too: half precision flips bits and with them assignments. On CUDA, TF32 must be
    off for the same reason.

    Args:
        q: (B, H, N, E) of any float type.
        planes: (P, E + 1), normal vectors and, in the last column, what a projection must exceed.
    Returns: (B, H, N, P) float32, 1 where the projection is strictly greater, else -1.
    """
    with torch.autocast(q.device.type, enabled=False):
        normals, offsets = planes[:, :-1].float(), planes[:, -1].float()
        return (q.detach().float() @ normals.T > offsets).float() * 2 - 1


def spread_positions(lengths: Tensor, num_clusters: int) -> Tensor:
    """Spread C positions evenly over the real tokens of each sample; they repeat where there are fewer than C.

    Args:
        lengths: (B,) int64.
        num_clusters: C.
    Returns: (B, C) int64, floor(c · length / C).
    """
    return torch.arange(num_clusters, device=lengths.device) * lengths[:, None] // num_clusters


def lloyd(
    points: Tensor, centroids: Tensor, is_real: Tensor, *, num_iterations: int, metric: Metric
) -> tuple[Tensor, Tensor]:
    """Group points around centroids, as k-means does.

    A point goes to its nearest centroid, the first of equally near ones; a centroid moves to the middle of its points
    and stays where it is if it has none.

    Args:
        points: (B, H, N, P) float32, finite; ±1 with "lsh".
        centroids: (B, H, C, P) float32, where they start; ±1 with "lsh".
        is_real: (B, N) bool; the other points take no part.
        num_iterations: assignments, at least 1; the centroids move between them, so one time less.
        metric: the middle is the mean with "l2", the majority of each bit with "lsh"; a tie gives -1.
    Returns: clusters (B, H, N) int64, C for padding, and the centroids (B, H, C, P) of the last assignment.
    Source: official code, C++ on the CPU. Differs: there an empty cluster gets random bits.
    """
    with torch.autocast(points.device.type, enabled=False):
        C = centroids.shape[2]
        centroids = centroids.transpose(-2, -1)  # (B, H, P, C): products with transposed matrices take longer
        columns = F.pad(points.transpose(-2, -1), (0, 0, 0, 1), value=1.0)  # (B, H, P + 1, N); the last counts members
        points = F.pad(points, (0, 1), value=1.0)
        for _ in range(num_iterations - 1):
            sums = columns @ cluster_members(_assign(points, centroids, is_real), num_clusters=C)  # (B, H, P + 1, C)
            sums, counts = sums[:, :, :-1], sums[:, :, -1:]
            middles = (sums > 0).float() * 2 - 1 if metric == "lsh" else sums / counts.clamp(min=1)
            centroids = torch.where(counts > 0, middles, centroids)
        return _assign(points, centroids, is_real), centroids.transpose(-2, -1)


def _assign(points: Tensor, centroids: Tensor, is_real: Tensor) -> Tensor:
    """Find the first of the nearest centroids of each point.

    For ±1 vectors the order is that of the Hamming distance, and exact: the scores are multiples of a half below 2^23.
    For others it is exact up to rounding, which decides between centroids that are all but equal.

    Args:
        points: (B, H, N, P + 1), 1 in the last column.
        centroids: (B, H, P, C).
        is_real: (B, N) bool.
    Returns: (B, H, N) int64, C where the point is padding.
    """
    penalties = centroids.square().sum(dim=2, keepdim=True) / -2
    scores = points @ torch.cat((centroids, penalties), dim=2)  # (B, H, N, C)
    return torch.where(is_real[:, None], scores.argmax(dim=-1), centroids.shape[3])


def group_queries(q: Tensor, clusters: Tensor, *, num_clusters: int) -> Tensor:
    """Take the mean query of each cluster; gradients flow through it.

    Args:
        q: (B, H, N, E), finite.
        clusters: (B, H, N) int64, C where the query takes no part.
        num_clusters: C.
    Returns: (B, H, C, E), zeros for an empty cluster.
    """
    with torch.autocast(q.device.type, enabled=False):  # half precision overflows in sums over thousands of queries
        wide = torch.promote_types(q.dtype, torch.float32)
        members = cluster_members(clusters, num_clusters=num_clusters).to(wide)  # (B, H, N, C)
        return (members.transpose(-2, -1) @ q.to(wide) / members.sum(dim=2)[..., None].clamp(min=1)).to(q.dtype)


def spread_to_queries(x: Tensor, clusters: Tensor) -> Tensor:
    """Give every query its cluster's row: (B, H, C, D), clusters (B, H, N) → (B, H, N, D); zeros for cluster C."""
    return take_rows(F.pad(x, (0, 0, 0, 1)), clusters)


def cluster_members(clusters: Tensor, *, num_clusters: int) -> Tensor:
    """Mark the cluster of each query.

    Args:
        clusters: (B, H, N) int64, in [0, C].
        num_clusters: C.
    Returns: (B, H, N, C) float32, rows with a single 1; rows of zeros for padding.
    """
    marks = torch.eye(num_clusters + 1, num_clusters, device=clusters.device)
    # Rows are copied: comparing and casting (B, H, N, C) booleans takes ONNX Runtime several times as long.
    return marks.index_select(0, clusters.flatten()).reshape(*clusters.shape, num_clusters)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows of each head: x (B, H, N, E), index (B, H, M) int64 in [0, N) → (B, H, M, E)."""
    B, H, N, E = x.shape
    M = index.shape[2]
    firsts = (torch.arange(B * H, device=x.device) * N).reshape(B, H, 1)
    # Of flattened rows: `gather` would need an index as wide as the rows, and its gradient is slow.
    return x.reshape(B * H * N, E).index_select(0, (index + firsts).reshape(B * H * M)).reshape(B, H, M, E)
