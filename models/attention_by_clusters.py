"""Attention once every query has its cluster: plain, improved and causal, as pure functions of tensors.

Source: Vyas et al. 2020, "Fast Transformers with Clustered Attention", and its official code
(github.com/idiap/fast-transformers @2ad36b9).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import known_lengths
from models.cluster_blocks import make_blocks, past_slots, real_slots, slot_scores, slot_values
from models.clustering import group_queries, spread_to_queries, take_rows


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    key_lengths: Tensor | None = None,
    *,
    num_clusters: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Give every query the attention of its cluster's mean query.

    Args:
        q: (B, H, N, E).
        k: (B, H, S, E).
        v: (B, H, S, D).
        clusters: (B, H, N) int64, in [0, C), or C for padded queries.
        key_lengths: (B,) int64, None where all keys are real; a sample without keys gets zeros.
        num_clusters: C.
        scale: of the dot products; None is 1/√E.
        dropout: share of the weights that are dropped, in training.
    Returns: (B, H, N, D), zeros for padded queries.
    Source: Vyas et al. 2020, clustered attention; official `ClusteredAttention`.
    """
    is_key = _real_keys(k, key_lengths)
    q, k, v = _blank(q, clusters < num_clusters), _blank(k, is_key), _blank(v, is_key)
    scores = cluster_scores(group_queries(q, clusters, num_clusters=num_clusters), k, is_key)
    weights = masked_weights(scores, is_key[:, :, None], scale=scale or q.shape[3] ** -0.5)
    return spread_to_queries(_drop(weights, dropout) @ v, clusters)


def improved_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    key_lengths: Tensor | None = None,
    *,
    num_clusters: int,
    top_k: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend per cluster, and query by query to each cluster's strongest keys.

    Args:
        q, k, v, clusters, key_lengths, num_clusters, scale, dropout: as in `clustered_attention`.
        top_k: K > 0; from K = S on the result is full attention.
    Returns: (B, H, N, D), zeros for padded queries.
    Source: Vyas et al. 2020, improved clustered attention; official `ImprovedClusteredAttention`.
    Differs: a sample with fewer than K keys never sees padding (official: it can, as only the first head's and
        cluster's empty slots are masked).
    """
    scale = scale or q.shape[3] ** -0.5
    is_key, is_query = _real_keys(k, key_lengths), clusters < num_clusters
    q, k, v = _blank(q, is_query), _blank(k, is_key), _blank(v, is_key)
    scores = cluster_scores(group_queries(q, clusters, num_clusters=num_clusters), k, is_key)
    kept = strongest_keys(scores, top_k)
    rest, mass = split_weights(masked_weights(scores, is_key[:, :, None], scale=scale), kept)
    blocks = make_blocks(clusters, kept)
    exact = masked_weights(slot_scores(q, k, blocks), real_slots(blocks, known_lengths(k, key_lengths)), scale=scale)
    exact = exact * (1 - take_rows(mass[..., None], blocks.clusters)[..., None])
    attended = _blank(slot_values(_drop(exact, dropout), v, blocks), is_query)
    return attended + spread_to_queries(_drop(rest, dropout) @ v, clusters)


def causal_improved_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    key_lengths: Tensor | None = None,
    *,
    num_clusters: int,
    top_k: int,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend query by query to those of the cluster's strongest keys that are not later than the query.

    A query all of whose cluster's strongest keys are later gets zeros. Not fit for decoding token by token: clusters
    and strongest keys come from all queries, later ones included.

    Args:
        q, k, v, clusters, key_lengths, num_clusters, top_k, scale, dropout: as in `improved_clustered_attention`.
    Returns: (B, H, N, D), zeros for padded queries.
    Source: official `CausalImprovedClusteredAttention`.
    Differs: K does not shrink to the fewest keys of a sample in the batch, so that neighbours change nothing.
    """
    is_key, is_query = _real_keys(k, key_lengths), clusters < num_clusters
    q, k, v = _blank(q, is_query), _blank(k, is_key), _blank(v, is_key)
    scores = cluster_scores(group_queries(q, clusters, num_clusters=num_clusters), k, is_key)
    blocks = make_blocks(clusters, strongest_keys(scores, top_k))
    is_seen = real_slots(blocks, known_lengths(k, key_lengths)) & past_slots(blocks)
    exact = masked_weights(slot_scores(q, k, blocks), is_seen, scale=scale or q.shape[3] ** -0.5)
    return _blank(slot_values(_drop(exact, dropout), v, blocks), is_query)


def cluster_scores(grouped: Tensor, k: Tensor, is_key: Tensor) -> Tensor:
    """Multiply mean queries with keys, unscaled.

    Args:
        grouped: (B, H, C, E).
        k: (B, H, S, E).
        is_key: (B, 1, S) bool.
    Returns: (B, H, C, S), the lowest finite number where the key is padding.
    """
    scores = grouped @ k.transpose(-2, -1)
    return scores.masked_fill(~is_key[:, :, None], torch.finfo(scores.dtype).min)


def strongest_keys(scores: Tensor, top_k: int) -> Tensor:
    """Find the keys with the largest scores: (B, H, C, S) → (B, H, C, min(K, S)) int64, in no order.

    Where fewer than K keys are real, padding fills up. Of equal scores any may win, but always the same.
    """
    return scores.topk(torch.sym_min(top_k, scores.shape[3]), sorted=False).indices


def split_weights(weights: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Take the kept keys out of clusters' weights.

    Args:
        weights: (B, H, C, S).
        kept: (B, H, C, K) int64.
    Returns: weights with zeros at the kept keys, and what is left of each row's sum: (B, H, C), without gradient.
    Source: the official code leaves that sum out of the gradient; the golden gradients hold us to it.
    """
    rest = weights.scatter(3, kept, 0.0)
    return rest, rest.sum(dim=-1).detach()


def masked_weights(scores: Tensor, is_seen: Tensor, *, scale: float) -> Tensor:
    """Softmax over the last axis among what is seen; a row that sees nothing gets zeros.

    Args:
        scores: (…, S), finite where seen.
        is_seen: bool, broadcasts to the scores.
        scale: of the scores.
    """
    scores = (scores * scale).masked_fill(~is_seen, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) * is_seen


def _real_keys(k: Tensor, key_lengths: Tensor | None) -> Tensor:
    return (torch.arange(k.shape[2], device=k.device) < known_lengths(k, key_lengths)[:, None])[:, None]  # (B, 1, S)


def _blank(x: Tensor, is_real: Tensor) -> Tensor:
    """Replace padding by zeros: whatever it holds, a weight of 0 times it must be 0."""
    return x.masked_fill(~is_real[..., None], 0)


def _drop(weights: Tensor, dropout: float) -> Tensor:
    return F.dropout(weights, dropout) if dropout else weights
