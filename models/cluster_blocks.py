"""Products of each query with its own cluster's keys, laid out so that they are few large matrix products.

Queries are sorted by cluster and every cluster starts a block of R rows, so that all rows of a block meet the same K
keys. Fetching K keys for every query instead would need N·K·D numbers: half a gigabyte at N = 8192.

Source: ours; it computes what Vyas et al. 2020 compute in kernels of their own. The letter M counts blocks here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.clustering import cluster_members, take_rows

BLOCK_ROWS = 32  # R: with fewer, the same keys are fetched more often; with more, small clusters leave rows unused


class ClusterBlocks(NamedTuple):
    """Where the queries of one call stand: block m holds the rows [m·R, (m + 1)·R).

    Attributes:
        queries: (B, H, M·R) int64, query of each row; query 0 where the row is unused.
        rows: (B, H, N) int64, row of each query.
        clusters: (B, H, M) int64, cluster of each block, in [0, C); any cluster where the block is unused.
        keys: (B, H, M, K) int64, keys of that cluster.
    """

    queries: Tensor
    rows: Tensor
    clusters: Tensor
    keys: Tensor


def make_blocks(clusters: Tensor, kept: Tensor) -> ClusterBlocks:
    """Lay out queries in blocks.

    Args:
        clusters: (B, H, N) int64, in [0, C), or C for padded queries, which get rows too.
        kept: (B, H, C, K) int64, keys of each cluster.
    Returns: blocks with M = ceil(N / R) + C, which holds every way to split N queries into C clusters and the padding.
    """
    B, H, N = clusters.shape
    C = kept.shape[2]
    M = (N + BLOCK_ROWS - 1) // BLOCK_ROWS + C
    counts = cluster_members(clusters, num_clusters=C + 1).sum(dim=2).long()  # (B, H, C + 1)
    num_blocks = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = num_blocks.cumsum(dim=-1)

    ordered, order = clusters.sort(dim=-1)  # both (B, H, N)
    rank = torch.arange(N, device=clusters.device) - (counts.cumsum(dim=-1) - counts).gather(2, ordered)
    rows = (ends - num_blocks).gather(2, ordered) * BLOCK_ROWS + rank  # of the queries in order
    queries = torch.zeros(B, H, M * BLOCK_ROWS, dtype=torch.int64, device=clusters.device).scatter(2, rows, order)

    # Block m belongs to the first cluster that ends behind it.
    block_clusters = (ends[:, :, None] <= torch.arange(M, device=clusters.device)[:, None]).sum(dim=-1).clamp(max=C - 1)
    keys = take_rows(kept, block_clusters)
    return ClusterBlocks(queries, torch.zeros_like(order).scatter(2, order, rows), block_clusters, keys)


def slot_scores(q: Tensor, k: Tensor, blocks: ClusterBlocks) -> Tensor:
    """Multiply every row's query with its block's keys: q (B, H, N, E), k (B, H, S, E) → (B, H, M, R, K)."""
    M, K = blocks.keys.shape[2:]
    q = take_rows(q, blocks.queries).unflatten(2, (M, BLOCK_ROWS))  # (B, H, M, R, E)
    k = take_rows(k, blocks.keys.flatten(2)).unflatten(2, (M, K))  # (B, H, M, K, E)
    return q @ k.transpose(-2, -1)


def slot_values(weights: Tensor, v: Tensor, blocks: ClusterBlocks) -> Tensor:
    """Sum the values of every row's keys: weights (B, H, M, R, K), v (B, H, S, D) → per query (B, H, N, D)."""
    M, K = blocks.keys.shape[2:]
    v = take_rows(v, blocks.keys.flatten(2)).unflatten(2, (M, K))  # (B, H, M, K, D)
    return per_query(weights @ v, blocks)


def per_query(x: Tensor, blocks: ClusterBlocks) -> Tensor:
    """Bring rows back into the order of the queries: (B, H, M, R, D) → (B, H, N, D)."""
    return take_rows(x.flatten(2, 3), blocks.rows)


def real_slots(blocks: ClusterBlocks, key_lengths: Tensor) -> Tensor:
    """Tell which keys of the blocks are real: lengths (B,) int64 → (B, H, M, 1, K) bool."""
    return (blocks.keys < key_lengths[:, None, None, None])[:, :, :, None]


def past_slots(blocks: ClusterBlocks) -> Tensor:
    """Tell which keys of the blocks are not later than the row's query: (B, H, M, R, K) bool."""
    M = blocks.keys.shape[2]
    return blocks.queries.unflatten(2, (M, BLOCK_ROWS))[..., None] >= blocks.keys[:, :, :, None]
