from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import token_exchange
from models.token_exchange import grid_index, link_tokens, map2token, token2map
from tests.models.test_token_merging import random_cells, random_tokens
from tests.oracles import token_clustering as oracle


@pytest.mark.parametrize("links_per_cell", [0, 1 << 20], ids=["gathered", "dense"])
@pytest.mark.parametrize("grid", [(6, 8), (3, 4), (4, 5), (1, 1)])
def test_exchange_with_a_map_equals_the_naive_loop(
    links_per_cell: int, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_exchange, "LINKS_PER_CELL", links_per_cell)
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


def test_map_cells_are_found_as_by_nearest_interpolation() -> None:
    """For all maps that stages with stride 2 make of 1 to 260 rows of cells."""
    for rows, stage in product(range(1, 261), (1, 2, 3)):
        coarse = -(-rows // 2**stage)
        ramp = torch.arange(coarse, dtype=torch.float32).reshape(1, 1, coarse, 1)
        expected = F.interpolate(ramp, size=(rows, 1), mode="nearest").flatten().long()
        torch.testing.assert_close(grid_index((rows, 1), (coarse, 1)), expected, atol=0, rtol=0)
        if rows % coarse == 0:  # then `token2map` goes by equal blocks
            assert expected.tolist() == [row // (rows // coarse) for row in range(rows)]
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
