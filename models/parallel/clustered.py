"""Clustered attention over a sequence that is spread over ranks: what clusters see is sent, not keys and values.

Every rank holds as many consecutive slots. Each works out what all clusters see in its own keys; a cluster's owner, one
rank for an equal share of the clusters, merges that. Traffic grows with the number of clusters and not with the length.

Global clusters draw queries from all ranks, so sums of queries are added up first and what owners found goes to all.
Segment-local clusters draw theirs from one segment of consecutive tokens, so their owner is the only rank that asks.
The number of segments is a setting of the model: answers do not depend on the number of ranks.

Source: Vyas et al. 2020; how it is spread is ours.
Deliberately absent: the causal kind; dropout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.clustering import spread_to_queries
from models.parallel.cluster_plan import ClusterPlan
from models.parallel.differentiable import exchange, gather, sum_ranks
from models.parallel.tiles import wide


@dataclass(frozen=True)
class ClusteredShard:
    """One rank's tensors, with every slot filled and padding blanked.

    Attributes:
        q, k, v: (B, H, slots, D), (B, H, slots, D), (B, H, slots, E), float32 at least.
        clusters: (B, H, slots) int64 among those that this rank's queries may have, `num_asked` for padding.
        is_key: (B, slots) bool.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    clusters: Tensor
    is_key: Tensor


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    plan: ClusterPlan,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Give every query the attention of its cluster's mean query to the keys of all ranks; every rank has to call it.

    Args:
        q: (B, H, N, D), N = `plan.num_tokens`, 0 where ranks outnumber tokens.
        k: (B, H, N, D).
        v: (B, H, N, E).
        clusters: (B, H, N) int64, in [0, C), or C for padded queries; with segments, of the queries' own segments.
        plan: who holds what.
        key_lengths: (B,) int64, how many keys of the whole sequence are real, the same on all ranks; None means all.
        scale: of the dot products; None is 1/√D.
    Returns: (B, H, N, E), dtype of q; zeros for padded queries and samples without keys.
    Raises: ValueError if shapes or clusters do not fit, before any message; if ranks disagree on them, on all ranks;
        RankLost.
    """
    with torch.autocast(q.device.type, enabled=False):
        shard = fill_slots(q, k, v, clusters, plan, key_lengths=key_lengths)
        means, _ = mean_queries(shard, plan)
        scores = cluster_scores(means, shard, scale=q.shape[3] ** -0.5 if scale is None else scale)
        seen = to_owners(_see(scores, shard.v), plan)  # (G, B, H, owned, E + 1)
        own = (seen[..., :-1] * seen[..., -1:].softmax(dim=0)).sum(dim=0)
        out = spread_to_queries(from_owners(own, plan), shard.clusters)
        return out[:, :, : q.shape[2]].to(q.dtype)


def fill_slots(
    q: Tensor, k: Tensor, v: Tensor, clusters: Tensor, plan: ClusterPlan, *, key_lengths: Tensor | None
) -> ClusteredShard:
    """Check one rank's tensors, blank their padding and fill its slots.

    Args: as `clustered_attention`.
    Raises: ValueError.
    """
    B, H, N = q.shape[:3]
    shapes = [tuple(x.shape[:3]) for x in (q, k, v, clusters)]
    if shapes != [(B, H, plan.num_tokens)] * 4 or q.shape[3:] != k.shape[3:]:
        raise ValueError(
            f"q, k, v and clusters {shapes} must hold one batch, its heads and {plan.num_tokens} tokens, as rank "
            f"{plan.ranks.rank} of {plan.ranks.size} has of {plan.length}"
        )
    first = 0 if plan.is_global else plan.ranks.rank * plan.num_owned
    last = plan.num_clusters if plan.is_global else first + plan.num_owned
    is_query = clusters != plan.num_clusters
    if not ((clusters >= first) & (clusters < last) | ~is_query).all():
        raise ValueError(
            f"clusters of rank {plan.ranks.rank} must lie in [{first}, {last}), or be {plan.num_clusters} for padding; "
            f"got {int(clusters.min())} to {int(clusters.max())}"
        )
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    plan.check_agreement(q, value_dim=v.shape[3], has_gradient=int(has_gradient))
    is_key = torch.ones(B, N, dtype=torch.bool, device=q.device)
    if key_lengths is not None:
        is_key = torch.arange(N, device=q.device) + plan.first_token < key_lengths[:, None]
    missing = plan.num_slots - N
    clusters = torch.where(is_query, clusters - first, plan.num_asked)
    q = wide(q).masked_fill(~is_query[..., None], 0)
    k, v = (wide(x).masked_fill(~is_key[:, None, :, None], 0) for x in (k, v))
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    return ClusteredShard(
        q,
        k,
        v,
        F.pad(clusters, (0, missing), value=plan.num_asked),
        F.pad(is_key, (0, missing), value=False),
    )


def mean_queries(shard: ClusteredShard, plan: ClusterPlan) -> tuple[Tensor, Tensor]:
    """Average the queries of every cluster, those of all ranks.

    Returns: (B, H, owned · G, D), zeros for empty clusters, and which of this rank's own are empty: (B, H, owned) bool.
    """
    B, H, _, D = shard.q.shape
    C = plan.num_asked + 1
    index = (torch.arange(B * H, device=shard.q.device).reshape(B, H, 1) * C + shard.clusters).flatten()
    rows = F.pad(shard.q, (0, 1), value=1).reshape(-1, D + 1)  # the last column counts
    sums = rows.new_zeros(B * H * C, D + 1).index_add(0, index, rows).reshape(B, H, C, D + 1)[:, :, :-1]
    if plan.is_global:
        sums = sum_ranks(sums, plan.ranks)
    is_empty = sums[..., -1] == 0
    means = sums[..., :-1] / sums[..., -1:].clamp(min=1)
    if plan.is_global:
        return means, is_empty.unflatten(2, (plan.ranks.size, -1))[:, :, plan.ranks.rank]
    return join_owned(gather(means, plan.ranks)), is_empty


def cluster_scores(means: Tensor, shard: ClusteredShard, *, scale: float) -> Tensor:
    """Scaled scores of clusters with this rank's keys: (B, H, C, slots), the lowest finite number for padding."""
    scores = means @ shard.k.transpose(-2, -1) * scale
    return scores.masked_fill(~shard.is_key[:, None, None], torch.finfo(scores.dtype).min)


def to_owners(x: Tensor, plan: ClusterPlan) -> Tensor:
    """Send what this rank found for each cluster to its owner: (B, H, owned · G, …) → (G, B, H, owned, …)."""
    return exchange(x.unflatten(2, (plan.ranks.size, -1)).movedim(2, 0), plan.ranks)


def from_owners(x: Tensor, plan: ClusterPlan) -> Tensor:
    """Get what owners found for the clusters that this rank's queries may have: (B, H, owned, …) → (B, H, asked, …)."""
    return join_owned(gather(x, plan.ranks)) if plan.is_global else x


def join_owned(x: Tensor) -> Tensor:
    """Put the owners' clusters in order: (G, B, H, owned, …) → (B, H, G · owned, …)."""
    return x.movedim(0, 2).flatten(2, 3)


def _see(scores: Tensor, v: Tensor) -> Tensor:
    """Attend to this rank's keys: scores (B, H, C, slots), v (B, H, slots, E) → (B, H, C, E + 1), log-sum-exp last."""
    return torch.cat((scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1, keepdim=True)), dim=-1)
