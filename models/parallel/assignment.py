"""Clusters of queries that are spread over ranks, the same as one process would find.

Global clusters need to see all queries of a head: what they are clustered by, one 64-bit word with "lsh", goes to the
rank that has the head, and clusters come back. Segment-local clusters need no message.

Source: Vyas et al. 2020 for the clusters; how the work is spread is ours.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.clustering import Metric, cluster_queries, hash_bits
from models.parallel.cluster_plan import ClusterPlan

WORD_BITS = 64


def assign_clusters(
    q: Tensor, planes: Tensor, lengths: Tensor, plan: ClusterPlan, *, num_iterations: int, metric: Metric
) -> Tensor:
    """Assign every query to a cluster of its sample and head, and of its segment if the plan has several.

    Args:
        q: (B, H, N, E), N = `plan.num_tokens`.
        planes, num_iterations, metric: as in `cluster_queries`.
        lengths: (B,) int64, how many tokens of the whole sequence are real; the same on all ranks.
        plan: who holds what. Segment s has the clusters [s · C / segments, (s + 1) · C / segments).
    Returns: (B, H, N) int64, in [0, C) and C for padding; carries no gradient. It is what `cluster_queries` gives for
        all tokens at once, or for those of each segment, unless rounding, which can depend on how many are computed at
        once, decides a hash bit or between centroids that are all but equal.
    Raises: ValueError if q does not fit the plan or there are more than 64 planes, before any message; if ranks
        disagree, on all ranks; RankLost.
    """
    N = q.shape[2]
    if plan.num_tokens != N:
        raise ValueError(
            f"q {tuple(q.shape)} must hold the {plan.num_tokens} tokens that rank {plan.ranks.rank} of "
            f"{plan.ranks.size} has of {plan.length}"
        )
    if metric == "lsh" and len(planes) > WORD_BITS:
        raise ValueError(f"{len(planes)} hash planes must be at most {WORD_BITS}, as bits travel in one word")
    plan.check_agreement(q, num_iterations=num_iterations, num_planes=len(planes))
    q = F.pad(q.detach(), (0, 0, 0, plan.num_slots - N))
    assign = _assign_globally if plan.is_global else _assign_by_segment
    return assign(q, planes, lengths, plan, num_iterations=num_iterations, metric=metric)[:, :, :N]


def _assign_globally(
    q: Tensor, planes: Tensor, lengths: Tensor, plan: ClusterPlan, *, num_iterations: int, metric: Metric
) -> Tensor:
    ranks, H = plan.ranks, q.shape[1]
    points = _pack_bits(hash_bits(q, planes)) if metric == "lsh" else q.float()
    points = F.pad(points, (0, 0, 0, 0, 0, -H % ranks.size))  # ranks beyond the last head cluster zeros
    by_rank = ranks.exchange(points.unflatten(1, (ranks.size, -1)).transpose(0, 1)).wait()
    points = by_rank.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : plan.length]  # (B, heads, all tokens, …)
    if metric == "lsh":
        # Each bit is found again as the sign of a coordinate.
        points, planes = _unpack_bits(points, len(planes)), torch.eye(len(planes), len(planes) + 1, device=q.device)
    clusters = cluster_queries(
        points, planes, lengths, num_clusters=plan.num_clusters, num_iterations=num_iterations, metric=metric
    )
    clusters = F.pad(clusters, (0, ranks.size * plan.num_slots - plan.length), value=plan.num_clusters)
    clusters = clusters.to(torch.int16 if plan.num_clusters < 2**15 else torch.int32)
    by_rank = ranks.exchange(clusters.unflatten(2, (ranks.size, -1)).permute(2, 0, 1, 3)).wait()
    return by_rank.transpose(0, 1).flatten(1, 2)[:, :H].long()


def _assign_by_segment(
    q: Tensor, planes: Tensor, lengths: Tensor, plan: ClusterPlan, *, num_iterations: int, metric: Metric
) -> Tensor:
    here = plan.num_segments // plan.ranks.size
    segments = torch.arange(here, device=q.device) + plan.ranks.rank * here
    num_slots, C = plan.num_slots // here, plan.num_clusters // plan.num_segments
    clusters = cluster_queries(
        q.unflatten(2, (here, num_slots)).transpose(1, 2).flatten(0, 1),  # each segment as a sample
        planes,
        (lengths[:, None] - segments * num_slots).clamp(0, num_slots).flatten(),
        num_clusters=C,
        num_iterations=num_iterations,
        metric=metric,
    ).unflatten(0, (-1, here))  # (B, here, H, slots)
    clusters = torch.where(clusters < C, clusters + (segments * C)[:, None, None], plan.num_clusters)
    return clusters.transpose(1, 2).flatten(2)


def _pack_bits(bits: Tensor) -> Tensor:
    """±1 (…, P), P ≤ 64 → one word each: (…, 1) int64."""
    return ((bits > 0).long() << torch.arange(bits.shape[-1], device=bits.device)).sum(dim=-1, keepdim=True)


def _unpack_bits(words: Tensor, num_bits: int) -> Tensor:
    """Undo `_pack_bits`: (…, 1) → (…, P) float32."""
    return (words >> torch.arange(num_bits, device=words.device) & 1).float() * 2 - 1
