"""Clustered attention: queries that lie together attend together, so that cost grows with N and not with N².

Plain: one attention per cluster, for the mean of its queries. Improved: each query also attends by itself to the keys
that matter most to its cluster. Causal: the latter alone, without keys of the future.

Source: Vyas et al. 2020, "Fast Transformers with Clustered Attention", and its official code
(github.com/idiap/fast-transformers @2ad36b9).
Deliberately absent: masks other than lengths; causal attention for decoding token by token, which clusters made of all
queries rule out; fixing the hash planes to a task.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import known_lengths, padded_full_attention
from models.cluster_blocks import make_blocks, past_slots, real_slots, slot_scores, slot_values
from models.clustering import Metric, cluster_queries, group_queries, spread_to_queries, take_rows


@dataclass(frozen=True, kw_only=True)
class ClusteredAttentionConfig:
    """Numbers that differ between variants.

    Attributes:
        num_clusters: C.
        top_k: K, keys of each cluster that its queries attend to exactly; 0 is plain clustered attention.
        bits: P, hash planes of the metric "lsh".
        iterations: assignments of Lloyd's algorithm.
        metric: what queries are clustered by, see `models.clustering`; "lsh" is the paper's.
        has_hash_bias: whether hash planes may miss the origin.
        scale: of the dot products; None is 1/√E.
        full_below: samples with fewer queries and fewer keys get exact full attention.
        is_causal: whether a query sees no later key.
    """

    num_clusters: int = 100
    top_k: int = 32
    bits: int = 63
    iterations: int = 10
    metric: Metric = "lsh"
    has_hash_bias: bool = True
    scale: float | None = None
    full_below: int = 0
    is_causal: bool = False

    def __post_init__(self) -> None:
        """Refuse settings out of range or that do not fit together.

        Raises: ValueError naming the setting.
        """
        for name, least in {"num_clusters": 1, "top_k": 0, "iterations": 1, "full_below": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 1 <= self.bits <= 64:  # a native kernel packs them into one 64-bit word
            raise ValueError(f"bits={self.bits} must lie in [1, 64]")
        if self.metric not in get_args(Metric):
            raise ValueError(f"metric={self.metric} must be one of {', '.join(get_args(Metric))}")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale={self.scale} must be positive and finite")
        if self.is_causal and (self.top_k == 0 or self.full_below > 0):
            raise ValueError(
                f"is_causal needs top_k above 0 and full_below 0; got top_k={self.top_k}, full_below={self.full_below}"
            )


def attend(  # noqa: PLR0917 - its inputs are those of one operator
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    num_clusters: int,
    num_iterations: int,
    top_k: int,
    scale: float,
    metric: Metric,
    full_below: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cluster the queries and attend: all of clustered attention as one function of tensors and numbers.

    Args:
        q: (B, H, N, E), N ≥ 1.
        k: (B, H, S, E), S ≥ 1.
        v: (B, H, S, D).
        planes: (P, E + 1); (0, E + 1) will do for "l2".
        query_lengths, key_lengths: (B,) int64.
        num_clusters, num_iterations, metric: as in `cluster_queries`.
        top_k: K of `improved_clustered_attention`; 0 is `clustered_attention`.
        scale: of the dot products.
        full_below: samples with fewer queries and fewer keys get exact full attention.
        dropout: share of the attention weights that are dropped, in training.
    Returns: (B, H, N, D), zeros for padded queries, and clusters (B, H, N) int32, C for padded queries.
    """
    clusters = cluster_queries(
        q, planes, query_lengths, num_clusters=num_clusters, num_iterations=num_iterations, metric=metric
    )
    if top_k:
        out = improved_clustered_attention(
            q, k, v, clusters, key_lengths, num_clusters=num_clusters, top_k=top_k, scale=scale, dropout=dropout
        )
    else:
        out = clustered_attention(
            q, k, v, clusters, key_lengths, num_clusters=num_clusters, scale=scale, dropout=dropout
        )
    if full_below:
        N, S = (torch.sym_min(x.shape[2], full_below) for x in (q, k))
        q, k, v = q.narrow(2, 0, N), k.narrow(2, 0, S), v.narrow(2, 0, S)
        full = padded_full_attention(q, k, v, query_lengths, key_lengths, scale=scale, dropout=dropout)
        full = F.pad(full, (0, 0, 0, out.shape[2] - N))
        # By the sample's own lengths, never by the padded one: its neighbours in a batch must not change its answer.
        is_short = (query_lengths < full_below) & (key_lengths < full_below)
        out = torch.where(is_short[:, None, None, None], full, out)
    return out, clusters.int()


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


class ClusteredAttention(nn.Module):
    """Clustered attention on heads, with its hash planes.

    The planes are a buffer: saved with the weights, the same for all heads, never redrawn.

    Args:
        config: a variant.
        head_dim: E, of queries and keys.
        seed: of the hash planes; layers should differ.
        dropout: of the attention weights while training.

    Attributes:
        operator: what is called unless the attention is causal: `attend`, in whose place an export puts an operator.
    Differs: the official code draws planes anew in every call, so that no two answers are the same.
    """

    planes: Tensor

    def __init__(self, config: ClusteredAttentionConfig, *, head_dim: int, seed: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.operator: Callable[..., tuple[Tensor, Tensor]] = attend
        self.register_buffer("planes", draw_planes(config, head_dim=head_dim, seed=seed))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_lengths: Tensor | None, key_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cluster the queries and attend.

        Args:
            q: (B, H, N, E).
            k: (B, H, S, E).
            v: (B, H, S, D).
            query_lengths, key_lengths: (B,) int64, None where all is real.
        Returns: (B, H, N, D), zeros for padded queries, and clusters (B, H, N) int64, C for padded queries.
        """
        config, dropout = self.config, self.dropout if self.training else 0.0
        query_lengths, key_lengths = known_lengths(q, query_lengths), known_lengths(k, key_lengths)
        num_clusters, top_k, scale = config.num_clusters, config.top_k, config.scale or q.shape[3] ** -0.5
        if config.is_causal:
            clusters = cluster_queries(
                q,
                self.planes,
                query_lengths,
                num_clusters=num_clusters,
                num_iterations=config.iterations,
                metric=config.metric,
            )
            out = causal_improved_clustered_attention(
                q, k, v, clusters, key_lengths, num_clusters=num_clusters, top_k=top_k, scale=scale, dropout=dropout
            )
            return out, clusters
        out, clusters = self.operator(
            q,
            k,
            v,
            self.planes,
            query_lengths,
            key_lengths,
            num_clusters=num_clusters,
            num_iterations=config.iterations,
            top_k=top_k,
            scale=scale,
            metric=config.metric,
            full_below=config.full_below,
            dropout=dropout,
        )
        return out, clusters.long()


def draw_planes(config: ClusteredAttentionConfig, *, head_dim: int, seed: int) -> Tensor:
    """Draw hash planes from a normal distribution: (P, E + 1) float32, P = 0 with "l2"."""
    if config.metric == "l2":
        return torch.zeros(0, head_dim + 1)
    planes = torch.randn(config.bits, head_dim + 1, generator=torch.Generator().manual_seed(seed))
    if not config.has_hash_bias:
        planes[:, -1] = 0
    return planes


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
