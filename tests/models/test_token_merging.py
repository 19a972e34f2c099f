from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import token_merging
from models.token_merging import (
    dpc_knn,
    grid_index,
    link_tokens,
    map2token,
    merge_tokens,
    take_tokens,
    token2map,
    token_downup,
    weighted_means,
)
from tests.oracles import token_clustering as oracle


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_cells(num_cells: int, num_tokens: int, *, batch: int = 2) -> Tensor:
    """Tokens of cells, every token with one at least."""
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(num_tokens, (batch, num_cells - num_tokens), generator=generator)
    cells = torch.cat([torch.arange(num_tokens).expand(batch, -1), some], dim=1)
    return cells[:, torch.randperm(num_cells, generator=generator)]


@pytest.mark.parametrize(
    ("num_tokens", "num_clusters", "num_neighbors"), [(20, 5, 5), (33, 33, 3), (7, 1, 1), (4, 2, 9)]
)
def test_clusters_equal_the_naive_loop(num_tokens: int, num_clusters: int, num_neighbors: int) -> None:
    x = random_tokens(2, num_tokens, 6)
    peaks = dpc_knn(x, num_clusters=num_clusters, num_neighbors=num_neighbors)
    for b in range(2):
        clusters, centers = oracle.dpc_knn(
            x[b].numpy(), num_clusters=num_clusters, num_neighbors=min(num_neighbors, num_tokens)
        )
        assert peaks.clusters[b].tolist() == clusters
        assert peaks.centers[b].tolist() == centers


@pytest.mark.parametrize("is_masked", [False, True])
def test_comparing_block_by_block_changes_nothing(is_masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_tokens(2, 50, 6)
    is_real = torch.arange(50) < torch.tensor([[50], [31]])
    settings: dict[str, Any] = {"is_neighbor": is_real, "is_real": is_real} if is_masked else {}
    whole = dpc_knn(x, num_clusters=12, **settings)
    monkeypatch.setattr(token_merging, "SPLIT_FROM", 50)
    monkeypatch.setattr(token_merging, "MAX_PAIRS", 50 * 7)
    split = dpc_knn(x, num_clusters=12, **settings)
    torch.testing.assert_close(split.clusters, whole.clusters, atol=0, rtol=0)
    torch.testing.assert_close(split.centers, whole.centers, atol=0, rtol=0)
    torch.testing.assert_close(split.scores, whole.scores, atol=1e-12, rtol=1e-12)


def test_padding_changes_nothing_for_the_real_tokens() -> None:
    x = random_tokens(1, 20, 4)
    padded = torch.cat([x, 0.1 * random_tokens(1, 6, 4, seed=2)], dim=1)  # in the middle of the others
    is_real = torch.arange(26)[None] < 20
    peaks = dpc_knn(padded, num_clusters=5, is_neighbor=is_real, is_real=is_real)
    alone = dpc_knn(x, num_clusters=5)
    torch.testing.assert_close(peaks.centers, alone.centers, atol=0, rtol=0)
    torch.testing.assert_close(peaks.clusters[:, :20], alone.clusters, atol=0, rtol=0)
    torch.testing.assert_close(peaks.density[:, :20], alone.density, atol=1e-12, rtol=1e-12)


def test_equal_tokens_become_centers_in_order_of_index() -> None:
    peaks = dpc_knn(torch.ones(1, 40, 3), num_clusters=10)
    assert peaks.centers[0].tolist() == list(range(10))
    assert peaks.clusters[0].tolist() == [*range(10), *[0] * 30]


def test_noise_decides_between_equal_tokens() -> None:
    noise = torch.arange(40, dtype=torch.float64)[None] / 40
    peaks = dpc_knn(torch.ones(1, 40, 3, dtype=torch.float64), num_clusters=1, noise=noise)
    torch.testing.assert_close(peaks.density - 1, noise * 1e-6, atol=1e-12, rtol=0)
    assert peaks.density[0].argmax() == 39


def test_a_batch_mate_far_away_changes_nothing() -> None:
    x = random_tokens(1, 30, 4)
    is_real = torch.arange(30)[None] < 25
    for mask in (None, is_real):
        alone = dpc_knn(x, num_clusters=6, is_neighbor=mask, is_real=mask)
        both = None if mask is None else mask.expand(2, -1)
        together = dpc_knn(torch.cat([x, 100 * x]), num_clusters=6, is_neighbor=both, is_real=both)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(b[:1], a, atol=1e-9, rtol=1e-9)


def test_half_precision_is_clustered_in_single() -> None:
    x = random_tokens(1, 30, 4).bfloat16()
    torch.testing.assert_close(dpc_knn(x, num_clusters=6), dpc_knn(x.float(), num_clusters=6), atol=0, rtol=0)


class LargestAllocation(TorchDispatchMode):
    """Records the bytes of the largest storage that any operation returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("side", [64, 128, 256])
def test_no_matrix_of_all_pairs_is_made_of_many_tokens(side: int) -> None:
    """64, 128 and 256 cells each way are pictures of 256, 512 and 1024 pixels."""
    with torch.device("meta"), LargestAllocation() as largest:
        dpc_knn(torch.empty(1, side**2, 64), num_clusters=side**2 // 4)
    assert largest.num_bytes <= max(4 * token_merging.MAX_PAIRS, 4 * 66 * side**2)  # 34 MB; N² is 17 GB at 1024 pixels


def test_the_recorder_of_allocations_sees_a_matrix_of_all_pairs() -> None:
    with torch.device("meta"), LargestAllocation() as largest:
        torch.cdist(torch.empty(1, 4095, 8), torch.empty(1, 4095, 8))
    assert largest.num_bytes == 4 * 4095**2


@pytest.mark.parametrize("has_cells", [False, True])
def test_merging_equals_the_naive_loop(has_cells: bool) -> None:
    x, weights = random_tokens(2, 14, 3), random_tokens(2, 14).exp()
    clusters = random_cells(14, 4)
    cells, cell_weights = random_cells(30, 14), random_tokens(2, 30).exp()
    merged, token_of_cell, merged_weights = merge_tokens(
        x, weights, clusters, *((cells, cell_weights) if has_cells else (None, None)), num_clusters=4
    )
    for b in range(2):
        expected, shares = oracle.merge(x[b].numpy(), weights[b].numpy(), clusters[b].numpy(), num_clusters=4)
        torch.testing.assert_close(merged[b], torch.from_numpy(expected), atol=1e-12, rtol=1e-12)
        if has_cells:
            assert token_of_cell[b].tolist() == [clusters[b, token].item() for token in cells[b]]
            shares = shares[cells[b].numpy()] * cell_weights[b].numpy()
        else:
            torch.testing.assert_close(token_of_cell, clusters, atol=0, rtol=0)
        torch.testing.assert_close(merged_weights[b], torch.from_numpy(shares), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("links_per_cell", [0, 1 << 20], ids=["gathered", "dense"])
@pytest.mark.parametrize("grid", [(6, 8), (3, 4), (4, 5), (1, 1)])
def test_exchange_with_a_map_equals_the_naive_loop(
    links_per_cell: int, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_merging, "LINKS_PER_CELL", links_per_cell)
    cells, x, fmap = random_cells(48, 9), random_tokens(2, 9, 3), random_tokens(2, 3, *grid)
    links = link_tokens(cells, num_tokens=9, cell_grid=(6, 8), grid=grid, dtype=torch.float64)
    assert (links.to_map is None) == (links_per_cell == 0)
    drawn, read = token2map(x, links), map2token(fmap, links)
    place, ones = oracle.grid_index((6, 8), grid), np.ones(48)
    for b in range(2):
        tokens = cells[b].tolist()
        on_map = oracle.carry(x[b].numpy(), tokens, place, ones, num=grid[0] * grid[1])
        on_tokens = oracle.carry(fmap[b].flatten(1).T.numpy(), place, tokens, ones, num=9)
        # Where the map's cells are the tokens' the mean is exact; the oracle's, as the official, is 1e-6 too small.
        torch.testing.assert_close(drawn[b].flatten(1).T, torch.from_numpy(on_map), atol=1e-12, rtol=1.1e-6)
        torch.testing.assert_close(read[b], torch.from_numpy(on_tokens), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("grid", [(6, 8), (3, 4), (4, 5)])
def test_cells_that_are_their_own_tokens_are_exchanged_as_such(grid: tuple[int, int]) -> None:
    x, fmap = random_tokens(2, 48, 3), random_tokens(2, 3, *grid)
    settings: dict[str, Any] = {"num_tokens": 48, "cell_grid": (6, 8), "grid": grid, "dtype": torch.float64}
    themselves = link_tokens(None, **settings)
    told = link_tokens(torch.arange(48).expand(2, -1), **settings)
    torch.testing.assert_close(token2map(x, themselves), token2map(x, told), atol=1e-12, rtol=1.1e-6)
    torch.testing.assert_close(map2token(fmap, themselves), map2token(fmap, told), atol=1e-12, rtol=1.1e-6)


def test_tokens_are_carried_over_as_in_the_naive_loop() -> None:
    x, weights = random_tokens(2, 9, 3), random_tokens(2, 30).exp()
    source, target = random_cells(30, 9), random_cells(30, 5)
    for cells, tokens in ((source, x), (None, random_tokens(2, 30, 3))):
        found = token_downup(tokens, cells, target, weights, num_targets=5)
        for b in range(2):
            places = list(range(30)) if cells is None else cells[b].tolist()
            expected = oracle.carry(tokens[b].numpy(), places, target[b].tolist(), weights[b].numpy(), num=5)
            torch.testing.assert_close(found[b], torch.from_numpy(expected), atol=1e-12, rtol=1e-12)


def test_carrying_over_to_the_tokens_before_merging_copies() -> None:
    x, clusters = random_tokens(2, 5, 3), random_cells(14, 5)
    cells, weights = random_cells(30, 14), random_tokens(2, 30).exp()
    found = token_downup(x, clusters.gather(1, cells), cells, weights, num_targets=14)
    torch.testing.assert_close(found, take_tokens(x, clusters), atol=1e-4, rtol=1e-5)  # weights + 1e-6


def test_long_sums_of_half_precision_are_made_in_single() -> None:
    x = torch.ones(1, 5000, 2, dtype=torch.bfloat16)
    means, totals = weighted_means(x, x[..., 0], torch.zeros(1, 5000, dtype=torch.int64), num_groups=1)
    torch.testing.assert_close(totals, torch.tensor([[5000.0]]), atol=1e-3, rtol=0)  # in bfloat16 sums stop at 256
    torch.testing.assert_close(means, torch.ones(1, 1, 2, dtype=torch.bfloat16), atol=0, rtol=0)


def test_an_empty_group_has_zeros() -> None:
    means, totals = weighted_means(torch.ones(1, 3, 2), torch.ones(1, 3), torch.tensor([[0, 2, 2]]), num_groups=4)
    torch.testing.assert_close(means[0, :, 0], torch.tensor([1.0, 0, 1, 0]), atol=2e-6, rtol=0)
    torch.testing.assert_close(totals, torch.tensor([[1.0, 0, 2, 0]]), atol=2e-6, rtol=0)


def test_map_cells_are_found_as_by_nearest_interpolation() -> None:
    """For all maps that stages with stride 2 make of 1 to 260 rows of cells."""
    for rows, stage in product(range(1, 261), (1, 2, 3)):
        coarse = -(-rows // 2**stage)
        ramp = torch.arange(coarse, dtype=torch.float32).reshape(1, 1, coarse, 1)
        expected = F.interpolate(ramp, size=(rows, 1), mode="nearest").flatten().long()
        torch.testing.assert_close(grid_index((rows, 1), (coarse, 1)), expected, atol=0, rtol=0)
    assert grid_index((2, 4), (1, 2)).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_a_map_finer_than_the_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="finer than the"):
        link_tokens(None, num_tokens=16, cell_grid=(4, 4), grid=(2, 5))


@pytest.mark.parametrize(("num_tokens", "side", "is_dense"), [(784, 28, False), (196, 14, True)])
def test_links_are_dense_where_they_are_few_for_the_number_of_cells(num_tokens: int, side: int, is_dense: bool) -> None:
    """Second and third stage at 224 pixels."""
    cells = torch.empty(1, 56**2, dtype=torch.int64, device="meta")
    links = link_tokens(cells, num_tokens=num_tokens, cell_grid=(56, 56), grid=(side, side))
    assert (links.to_map is not None) == is_dense
