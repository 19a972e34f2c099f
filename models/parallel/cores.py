"""Attention on heads, called as `FullAttention` and `ClusteredAttention` are, over tokens that are spread over ranks.

A rank's tokens are consecutive, as many slots on all ranks, and lengths are those of its own part: the real tokens of a
sample are its first ones, so its lengths on all ranks add up to its own.
"""

import torch
from torch import Tensor, nn

from models.attention import known_lengths
from models.clustered_attention import ALONE, ClusteredAttention, ClusteredAttentionConfig
from models.parallel.assignment import assign_clusters
from models.parallel.cluster_plan import ClusterPlan
from models.parallel.clustered import clustered_attention
from models.parallel.collectives import Communicator
from models.parallel.improved import improved_clustered_attention
from models.parallel.usp import SequenceParallel


class ParallelFullAttention(nn.Module):
    """Full attention, exact.

    Args:
        dense: how it is spread; layout "basic".
        scale: of the dot products; None is 1/√E.
    """

    def __init__(self, dense: SequenceParallel, *, scale: float | None = None) -> None:
        super().__init__()
        self._dense = dense
        self._scale = scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_lengths: Tensor | None, key_lengths: Tensor | None
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            q, k: (B, H, N, E), slots of this rank.
            v: (B, H, N, D).
            query_lengths, key_lengths: (B,) int64, how many of this rank's are real; None on all ranks where all are.
        Returns: (B, H, N, D), zeros for padded queries. There are no clusters.
        """
        length = self._dense.num_ranks * q.shape[2]
        if query_lengths is None and key_lengths is None:
            return self._dense.attend(q, k, v, length=length, scale=self._scale), None
        is_query, is_key = (
            torch.arange(q.shape[2], device=q.device) < known_lengths(q, lengths)[:, None]
            for lengths in (query_lengths, key_lengths)
        )
        q = q.masked_fill(~is_query[:, None, :, None], 0)
        out = self._dense.attend(q, k, v, length=length, key_mask=is_key, scale=self._scale)
        return out.masked_fill(~is_query[:, None, :, None], 0), None


class ParallelClusteredAttention(nn.Module):
    """Clustered attention with the config and hash planes of one that is not spread.

    Args:
        core: what it stands for.
        ranks: all ranks of the sequence.
        dense: how samples below `full_below` are spread; layout "basic".
        num_segments: 1 is clusters of the whole sequence, as `core` has them.
    Raises: ValueError for causal attention, for attention with dropout, and for segments that do not fit.
    """

    planes: Tensor

    def __init__(
        self, core: ClusteredAttention, ranks: Communicator, dense: SequenceParallel, *, num_segments: int = 1
    ) -> None:
        super().__init__()
        if core.config.is_causal or core.dropout:
            raise ValueError(
                f"is_causal={core.config.is_causal} and dropout={core.dropout} must be False and 0 for clustered "
                f"attention over ranks"
            )
        num_clusters = core.config.num_clusters
        ClusterPlan(
            ranks=ranks, length=1, num_clusters=num_clusters, num_segments=num_segments
        )  # refuses now, not later
        self.config: ClusteredAttentionConfig = core.config
        self.num_segments = num_segments
        self._ranks = ranks
        self._full = ParallelFullAttention(dense, scale=core.config.scale)
        self.register_buffer("planes", core.planes)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_lengths: Tensor | None, key_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cluster the queries and attend; shapes as in `ParallelFullAttention.forward`.

        Returns: (B, H, N, D), zeros for padded queries, and clusters (B, H, N) int64: C for padded queries, `ALONE` for
            the others of a sample with full attention.
        """
        config = self.config
        queries, keys = known_lengths(q, query_lengths), known_lengths(k, key_lengths)
        all_queries, all_keys = self._ranks.sum(torch.stack((queries, keys))).wait()
        # All ranks know all lengths, so they take the same way.
        is_short = ((all_queries < config.full_below) & (all_keys < config.full_below))[:, None, None]
        is_query = torch.arange(q.shape[2], device=q.device) < queries[:, None, None]
        alone = torch.where(is_query, ALONE, config.num_clusters).expand(q.shape[:3])
        if is_short.all():
            return self._full(q, k, v, queries, keys)[0], alone
        plan = ClusterPlan(
            ranks=self._ranks,
            length=self._ranks.size * q.shape[2],
            num_clusters=config.num_clusters,
            num_segments=self.num_segments,
        )
        clusters = assign_clusters(
            q, self.planes, all_queries, plan, num_iterations=config.iterations, metric=config.metric
        )
        if config.top_k:
            out = improved_clustered_attention(
                q, k, v, clusters, plan, top_k=config.top_k, key_lengths=all_keys, scale=config.scale
            )
        else:
            out = clustered_attention(q, k, v, clusters, plan, key_lengths=all_keys, scale=config.scale)
        if is_short.any():
            full = self._full(q, k, v, queries, keys)[0]
            out = torch.where(is_short[..., None], full, out)
        return out, torch.where(is_short, alone, clusters)
