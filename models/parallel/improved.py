"""Improved clustered attention over a sequence that is spread over ranks.

Clusters' strongest keys are found by their owners among every rank's strongest ones, and told to all. What clusters see
in other keys is merged as in plain clustered attention. Then each rank fetches the strongest keys of the clusters that
its queries may have, each row once, and attends to them.

With global clusters these may be nearly all keys. Where fetching and merging would send more than Ulysses does, heads
are exchanged for tokens instead. All ranks know all strongest keys, so they decide alike and without a message.

Source: Vyas et al. 2020; how it is spread is ours.
Differs: of equal scores, the earliest keys are kept.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention_by_clusters import masked_weights
from models.cluster_blocks import make_blocks, slot_scores, slot_values
from models.clustering import spread_to_queries, take_rows
from models.parallel.cluster_plan import ClusterPlan
from models.parallel.clustered import (
    ClusteredShard,
    cluster_scores,
    fill_slots,
    from_owners,
    join_owned,
    mean_queries,
    to_owners,
)
from models.parallel.collectives import Communicator
from models.parallel.differentiable import exchange, exchange_rows

WIDE_BYTES = 4  # of merged and fetched numbers
CLUSTER_BYTES = 4  # of a query's cluster, where heads are exchanged for tokens
LOW_WORD = 2**32 - 1
NOT_A_KEY = -(2**63)


class KeyTable(NamedTuple):
    """Rows of keys that were fetched.

    Attributes:
        k, v: (B, H, R, D) and (B, H, R, E), R the most of any sample and head.
        places: (B, H, all slots) int64, row of each token that was fetched.
    """

    k: Tensor
    v: Tensor
    places: Tensor


def improved_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    plan: ClusterPlan,
    *,
    top_k: int,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    max_fetch_ratio: float = 1.0,
    has_mass_gradient: bool = False,
) -> Tensor:
    """Attend per cluster, and query by query to each cluster's strongest keys; every rank has to call it.

    Args:
        q, k, v, clusters, plan, key_lengths, scale: as in `models.parallel.clustered.clustered_attention`.
        top_k: K > 0; from K = length on the result is full attention.
        max_fetch_ratio: most that fetching and merging may send, as a share of what Ulysses would; beyond it, heads are
            exchanged for tokens.
        has_mass_gradient: whether gradients flow through the weight that a cluster leaves to its other keys; the
            official code leaves them out, see `models.clustered_attention.split_weights`.
    Returns: (B, H, N, E), dtype of q; zeros for padded queries and samples without keys.
    Raises: ValueError if shapes, clusters or top_k do not fit, before any message; if ranks disagree on them,
        on all ranks; RankLost.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        shard = fill_slots(q, k, v, clusters, plan, key_lengths=key_lengths)
        means, is_empty = mean_queries(shard, plan)
        scores = cluster_scores(means, shard, scale=scale)
        kept = strongest_keys(scores.detach(), shard.is_key, is_empty, plan, top_k=top_k)
        needs = needed_keys(kept, plan)
        widths = {"head_dim": k.shape[3], "value_dim": v.shape[3]}
        heads_bytes = exchanging_bytes(needs, plan, item_bytes=q.element_size(), **widths)
        if fetching_bytes(needs, plan, **widths) <= max_fetch_ratio * heads_bytes:
            rest, mass = _see_rest(scores, kept, shard.v, plan)
            mass = mass if has_mass_gradient else mass.detach()
            table = _fetch(shard, needs, plan)
            out = _attend_kept(shard, table, _asked(kept, plan), mass, scale=scale)
            return (out + spread_to_queries(rest, shard.clusters))[:, :, : q.shape[2]].to(q.dtype)
    q, k, v, clusters = _scatter_heads(q, k, v, clusters, plan)
    out = improved_clustered_attention(
        q,
        k,
        v,
        clusters,
        replace(plan, ranks=Communicator(None), num_segments=1),
        top_k=top_k,
        key_lengths=key_lengths,
        scale=scale,
        has_mass_gradient=has_mass_gradient,
    )
    return _gather_heads(out, plan, num_heads=kept.shape[1])


def strongest_keys(scores: Tensor, is_key: Tensor, is_empty: Tensor, plan: ClusterPlan, *, top_k: int) -> Tensor:
    """Find the keys of all ranks with the largest scores, of equal ones the earliest.

    Args:
        scores: (B, H, owned · G, slots), with this rank's keys.
        is_key: (B, slots) bool.
        is_empty: (B, H, owned) bool, which of this rank's own clusters have no query, and so keep no key.
        plan: who holds what.
        top_k: K.
    Returns: (B, H, owned · G, at most K) int64, tokens of the whole sequence, -1 where fewer keys are real.
    """
    tokens = torch.arange(scores.shape[3], device=scores.device) + plan.first_token
    ranked = _rank_keys(scores.float(), tokens).masked_fill(~is_key[:, None, None], NOT_A_KEY)
    offered = ranked.topk(min(top_k, scores.shape[3]), sorted=False).values  # (B, H, owned · G, …)
    received = plan.ranks.exchange(offered.unflatten(2, (plan.ranks.size, -1)).movedim(2, 0)).wait()
    received = received.movedim(0, 3).flatten(3)  # (B, H, owned, …)
    best = received.topk(min(top_k, received.shape[3]), sorted=False).values
    tokens = torch.where((best == NOT_A_KEY) | is_empty[..., None], -1, LOW_WORD - (best & LOW_WORD))
    return join_owned(plan.ranks.gather(tokens.int()).wait()).long()


def needed_keys(kept: Tensor, plan: ClusterPlan) -> Tensor:
    """Tell which keys each rank attends to exactly: kept (B, H, owned · G, K) → (G, B, H, all slots) bool."""
    G = plan.ranks.size
    tokens = kept.flatten(2)[:, :, None] if plan.is_global else kept.unflatten(2, (G, -1)).flatten(3)
    is_needed = _mark(tokens, G * plan.num_slots)  # (B, H, 1 or G, all slots)
    return is_needed.movedim(2, 0).expand(G, -1, -1, -1)


def fetching_bytes(needs: Tensor, plan: ClusterPlan, *, head_dim: int, value_dim: int) -> int:
    """What all ranks together send to fetch keys and values, and to merge what clusters see in other keys."""
    G, B, H, _ = needs.shape
    by_source = needs.unflatten(3, (G, -1)).sum(dim=(1, 2, 4))  # (G needing, G holding)
    fetched = int(by_source.sum() - by_source.diagonal().sum()) * (head_dim + value_dim)
    merged = (value_dim + 2) + (value_dim + 1 if plan.is_global else 0)  # to owners, and from them
    return WIDE_BYTES * (fetched + G * (G - 1) * B * H * plan.num_owned * merged)


def exchanging_bytes(needs: Tensor, plan: ClusterPlan, *, head_dim: int, value_dim: int, item_bytes: int) -> int:
    """What all ranks together send to exchange heads for tokens and back, clusters included."""
    G, B, H, _ = needs.shape
    return (G - 1) * B * -(-H // G) * G * plan.num_slots * (2 * (head_dim + value_dim) * item_bytes + CLUSTER_BYTES)


def _rank_keys(scores: Tensor, tokens: Tensor) -> Tensor:
    """One whole number for each key, larger for a larger score and then for an earlier token: float32 → int64."""
    bits = scores.contiguous().view(torch.int32)
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # floats below zero descend as whole numbers
    return (ordered.long() << 32) + (LOW_WORD - tokens)


def _see_rest(scores: Tensor, kept: Tensor, v: Tensor, plan: ClusterPlan) -> tuple[Tensor, Tensor]:
    """What clusters see in keys that they do not keep.

    Returns: (B, H, asked, E), and the weight of those keys (B, H, asked).
    """
    is_kept = _mark(kept - plan.first_token, plan.num_slots)
    lowest = torch.finfo(scores.dtype).min
    rest = scores.masked_fill(is_kept, lowest)
    seen = (rest.softmax(dim=-1) @ v, rest.logsumexp(dim=-1, keepdim=True), scores.logsumexp(dim=-1, keepdim=True))
    by_rank = to_owners(torch.cat(seen, dim=-1), plan)  # (G, B, H, owned, E + 2)
    shares = (by_rank[..., -2] - by_rank[..., -1].logsumexp(dim=0)).exp()
    attended = (by_rank[..., :-2] * shares[..., None]).sum(dim=0)
    told = from_owners(torch.cat((attended, shares.sum(dim=0)[..., None]), dim=-1), plan)
    return told[..., :-1], told[..., -1]


def _fetch(shard: ClusteredShard, needs: Tensor, plan: ClusterPlan) -> KeyTable:
    """Send each rank the rows that it needs of this rank's, and receive what this rank needs."""
    ranks, num_slots = plan.ranks, plan.num_slots
    sent = needs.unflatten(3, (ranks.size, -1))[:, :, :, ranks.rank]  # (G, B, H, slots)
    wanted = needs[ranks.rank]  # (B, H, all slots)
    received = wanted.unflatten(2, (ranks.size, -1)).movedim(2, 0)
    _, sample, head, slot = sent.nonzero(as_tuple=True)
    rows = torch.cat((shard.k, shard.v), dim=-1)[sample, head, slot]
    rows = exchange_rows(rows, ranks, *(x.flatten(1).sum(dim=1).tolist() for x in (sent, received)))
    places = wanted.cumsum(dim=2) - 1
    source, sample, head, slot = received.nonzero(as_tuple=True)
    place = places[sample, head, source * num_slots + slot]
    table = rows.new_zeros(*wanted.shape[:2], max(1, int(places.max()) + 1), rows.shape[1])
    table = table.index_put((sample, head, place), rows)
    k, v = table.split((shard.k.shape[3], shard.v.shape[3]), dim=-1)
    return KeyTable(k, v, places)


def _attend_kept(shard: ClusteredShard, table: KeyTable, kept: Tensor, mass: Tensor, *, scale: float) -> Tensor:
    """Attend from each query to its cluster's keys kept (B, H, asked, K): (B, H, slots, E), zeros for padding."""
    places = table.places.gather(2, kept.clamp(min=0).flatten(2)).unflatten(2, kept.shape[2:])
    blocks = make_blocks(shard.clusters, places.masked_fill(kept < 0, 0))
    is_real = take_rows(kept >= 0, blocks.clusters)[:, :, :, None]  # (B, H, M, 1, K)
    weights = masked_weights(slot_scores(shard.q, table.k, blocks), is_real, scale=scale)
    weights = weights * (1 - take_rows(mass[..., None], blocks.clusters)[..., None])
    is_padding = shard.clusters == kept.shape[2]
    return slot_values(weights, table.v, blocks).masked_fill(is_padding[..., None], 0)


def _scatter_heads(
    q: Tensor, k: Tensor, v: Tensor, clusters: Tensor, plan: ClusterPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exchange heads for tokens: (B, H, N, …) → (B, heads of this rank, length, …); zeros where there is none."""
    missing = -q.shape[1] % plan.ranks.size, plan.num_slots - q.shape[2]
    heads = F.pad(torch.cat((q, k, v), dim=-1), (0, 0, 0, missing[1], 0, missing[0]))
    clusters = F.pad(clusters.int(), (0, missing[1], 0, missing[0]), value=plan.num_clusters)
    heads = exchange(heads.unflatten(1, (plan.ranks.size, -1)).transpose(0, 1), plan.ranks)  # (G, B, heads, slots, …)
    clusters = plan.ranks.exchange(clusters.unflatten(1, (plan.ranks.size, -1)).transpose(0, 1)).wait()
    heads, clusters = (x.movedim(0, 2).flatten(2, 3)[:, :, : plan.length] for x in (heads, clusters))
    q, k, v = heads.split((q.shape[3], k.shape[3], v.shape[3]), dim=-1)
    return q, k, v, clusters.long()


def _gather_heads(out: Tensor, plan: ClusterPlan, *, num_heads: int) -> Tensor:
    """Exchange tokens for heads: (B, heads of this rank, length, E) → (B, H, N, E)."""
    out = F.pad(out, (0, 0, 0, plan.ranks.size * plan.num_slots - plan.length))
    by_rank = exchange(out.unflatten(2, (plan.ranks.size, -1)).movedim(2, 0), plan.ranks)  # (G, B, heads, slots, E)
    return by_rank.transpose(0, 1).flatten(1, 2)[:, :num_heads, : plan.num_tokens]


def _asked(kept: Tensor, plan: ClusterPlan) -> Tensor:
    """Of all clusters, those that this rank's queries may have: (B, H, owned · G, …) → (B, H, asked, …)."""
    return kept if plan.is_global else kept.unflatten(2, (plan.ranks.size, -1))[:, :, plan.ranks.rank]


def _mark(tokens: Tensor, num_tokens: int) -> Tensor:
    """Mark the tokens (…, M) that lie in [0, num_tokens): (…, num_tokens) bool."""
    inside = torch.where((tokens >= 0) & (tokens < num_tokens), tokens, num_tokens)
    marks = torch.zeros(*tokens.shape[:-1], num_tokens + 1, dtype=torch.bool, device=tokens.device)
    return marks.scatter(-1, inside, value=True)[..., :-1]
