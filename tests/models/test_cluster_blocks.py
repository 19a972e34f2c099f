import pytest
import torch
from torch import Tensor

from models.cluster_blocks import (
    BLOCK_ROWS,
    ClusterBlocks,
    make_blocks,
    past_slots,
    per_query,
    real_slots,
    slot_scores,
    slot_values,
)

B, H, N, S, C, K = 2, 3, 150, 40, 7, 5
RNG = torch.Generator().manual_seed(0)


def random_clusters() -> Tensor:
    """Some clusters empty, some of several blocks, some queries padding."""
    shares = torch.tensor([0.6, 0.0, 0.2, 0.1, 0.0, 0.05, 0.0, 0.05])
    return shares.multinomial(B * H * N, replacement=True, generator=RNG).reshape(B, H, N)


def blocks_and_kept(clusters: Tensor) -> tuple[ClusterBlocks, Tensor]:
    kept = torch.rand(*clusters.shape[:2], C, S, generator=RNG).argsort(dim=-1)[..., :K]
    return make_blocks(clusters, kept), kept


def check_layout(clusters: Tensor, blocks: ClusterBlocks) -> None:
    for clusters_of_head, queries, rows, owners in zip(
        *(x.flatten(0, 1) for x in (clusters, blocks.queries, blocks.rows, blocks.clusters)), strict=True
    ):
        assert len(rows.unique()) == len(rows), "two queries share a row"
        assert queries[rows].equal(torch.arange(len(rows)))
        is_real = clusters_of_head < C
        assert owners[rows // BLOCK_ROWS][is_real].equal(clusters_of_head[is_real])


def test_every_query_has_a_row_in_a_block_of_its_cluster() -> None:
    clusters = random_clusters()
    assert clusters.max() == C
    check_layout(clusters, blocks_and_kept(clusters)[0])


@pytest.mark.parametrize("padding", [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1])
@pytest.mark.parametrize("size", [1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1])
def test_blocks_suffice_for_every_split_of_the_queries(size: int, padding: int) -> None:
    clusters = torch.cat((torch.arange(C).repeat_interleave(size), torch.full((padding,), C)))
    clusters = clusters[torch.randperm(len(clusters), generator=RNG)].expand(1, 1, -1)
    blocks, _ = blocks_and_kept(clusters)
    used = C * -(-size // BLOCK_ROWS) + -(-padding // BLOCK_ROWS)
    assert used <= blocks.clusters.shape[2] == -(-clusters.shape[2] // BLOCK_ROWS) + C
    check_layout(clusters, blocks)


def test_products_are_those_of_each_query_with_its_clusters_keys() -> None:
    clusters = random_clusters()
    blocks, kept = blocks_and_kept(clusters)
    q = torch.randn(B, H, N, 4, generator=RNG, dtype=torch.float64)
    k, v = torch.randn(2, B, H, S, 4, generator=RNG, dtype=torch.float64)
    scores = slot_scores(q, k, blocks)
    found, values = per_query(scores, blocks), slot_values(scores, v, blocks)
    for b in range(B):
        for h in range(H):
            for n in range(N):
                if clusters[b, h, n] < C:
                    keys = kept[b, h, clusters[b, h, n]]
                    expected = k[b, h, keys] @ q[b, h, n]
                    torch.testing.assert_close(found[b, h, n], expected, atol=1e-12, rtol=1e-12)
                    torch.testing.assert_close(values[b, h, n], expected @ v[b, h, keys], atol=1e-12, rtol=1e-12)


def test_slots_are_told_real_and_past_by_key_and_query() -> None:
    clusters = random_clusters()
    blocks, kept = blocks_and_kept(clusters)
    lengths = torch.tensor([S, S // 2])
    M = blocks.clusters.shape[2]
    is_real = per_query(real_slots(blocks, lengths).expand(B, H, M, BLOCK_ROWS, K), blocks)
    is_past = per_query(past_slots(blocks), blocks)
    is_query = clusters < C
    keys = kept.gather(2, clusters.clamp(max=C - 1)[..., None].expand(-1, -1, -1, K))  # (B, H, N, K)
    assert is_real[is_query].equal((keys < lengths[:, None, None, None])[is_query])
    assert is_past[is_query].equal((keys <= torch.arange(N)[:, None])[is_query])
