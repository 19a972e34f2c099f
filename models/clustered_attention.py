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
from models.attention_by_clusters import (
    causal_improved_clustered_attention,
    clustered_attention,
    improved_clustered_attention,
)
from models.clustering import Metric, cluster_queries

ALONE = -1  # the "cluster" of a query that attends by itself


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
    Returns: (B, H, N, D), zeros for padded queries, and clusters (B, H, N) int32: C for padded queries, `ALONE` for the
        others of a sample with full attention.
    """
    # An export has to contain both ways; which one a batch goes is then the program's choice (`export`).
    if full_below and not torch.compiler.is_exporting() and are_short(query_lengths, key_lengths, full_below).all():
        return attend_short(
            q,
            k,
            v,
            query_lengths,
            key_lengths,
            num_clusters=num_clusters,
            scale=scale,
            full_below=full_below,
            dropout=dropout,
        )
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
    if not full_below:
        return out, clusters.int()
    full, alone = attend_short(
        q,
        k,
        v,
        query_lengths,
        key_lengths,
        num_clusters=num_clusters,
        scale=scale,
        full_below=full_below,
        dropout=dropout,
    )
    is_short = are_short(query_lengths, key_lengths, full_below)[:, None, None]
    return torch.where(is_short[..., None], full, out), torch.where(is_short, alone, clusters.int())


def attend_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    num_clusters: int,
    scale: float,
    full_below: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend in full, in samples with fewer than `full_below` queries and keys; results of others mean nothing.

    Args and returns: as in `attend`.
    """
    num_queries = q.shape[2]
    is_query = torch.arange(num_queries, device=q.device) < query_lengths[:, None]
    alone = torch.where(is_query, ALONE, num_clusters).int()[:, None].expand(-1, q.shape[1], -1)
    N, S = (torch.sym_min(x.shape[2], full_below) for x in (q, k))
    q, k, v = q.narrow(2, 0, N), k.narrow(2, 0, S), v.narrow(2, 0, S)
    full = padded_full_attention(q, k, v, query_lengths, key_lengths, scale=scale, dropout=dropout)
    return F.pad(full, (0, 0, 0, num_queries - N)), alone


def are_short(query_lengths: Tensor, key_lengths: Tensor, full_below: int) -> Tensor:
    """Tell which samples get full attention: (B,) bool.

    By their own lengths, never by the padded one: neighbours in a batch must not change an answer.
    """
    return (query_lengths < full_below) & (key_lengths < full_below)


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
        Returns: (B, H, N, D), zeros for padded queries, and clusters (B, H, N) int64: C for padded queries, `ALONE` for
            the others of a sample with full attention.
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
