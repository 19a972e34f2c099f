"""TCFormer with the exchange between tokens and maps as the paper describes it: features are scattered and added up.

A yardstick: what the dense matrices and gathers of `models/token_exchange.py` save. Clustering, attention and weights
are the model's own.

Source: Zeng et al. 2022, section 3.3, "token-to-map" and "map-to-token": every cell of the finest grid carries the
features of its token to its place on the map, or those of its place to its token, each divided by the number of cells.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from models import mta, tcformer_v2, token_blocks
from models.layers import map_to_tokens, tokens_to_map
from models.token_exchange import Links, grid_index
from models.token_merging import EPS


@contextmanager
def with_scattered_exchange() -> Iterator[None]:
    """Let all TCFormers scatter in the `with` block, in this whole process."""
    with ExitStack() as stack:
        for module in (token_blocks, mta, tcformer_v2):
            stack.enter_context(patch.object(module, "token2map", scatter_to_map))
        stack.enter_context(patch.object(token_blocks, "map2token", scatter_to_tokens))
        stack.enter_context(patch.object(token_blocks, "link_tokens", _link_nothing))
        yield


def scatter_to_map(x: Tensor, links: Links) -> Tensor:
    """As `token_exchange.token2map`."""
    token, place = _ends(links, x)
    return tokens_to_map(_scatter(x, token, place, num_targets=links.grid[0] * links.grid[1]), links.grid)


def scatter_to_tokens(fmap: Tensor, links: Links) -> Tensor:
    """As `token_exchange.map2token`."""
    token, place = _ends(links, fmap)
    return _scatter(map_to_tokens(fmap), place, token, num_targets=links.num_tokens)


def _ends(links: Links, x: Tensor) -> tuple[Tensor, Tensor]:
    """Token and map cell of each cell, (B, M) both."""
    cells = torch.arange(links.cell_grid[0] * links.cell_grid[1], device=x.device).expand(x.shape[0], -1)
    place = grid_index(links.cell_grid, links.grid, device=x.device).expand_as(cells)
    return cells if links.token_of_cell is None else links.token_of_cell, place


def _scatter(x: Tensor, source: Tensor, target: Tensor, *, num_targets: int) -> Tensor:
    """Means over cells: x (B, N, E), ends (B, M) → (B, num_targets, E)."""
    B, N, E = x.shape
    batch = torch.arange(B, device=x.device)[:, None]
    source, target = (source + batch * N).flatten(), (target + batch * num_targets).flatten()
    counts = x.new_zeros(B * num_targets).index_add(0, target, x.new_ones(len(target)))
    shares = 1 / (counts + EPS)
    cells = x.reshape(B * N, E)[source] * shares[target][:, None]
    means: Tensor = x.new_zeros(B * num_targets, E).index_add(0, target, cells)
    return means.reshape(B, num_targets, E)


def _link_nothing(
    token_of_cell: Tensor | None,
    *,
    num_tokens: int,
    cell_grid: tuple[int, int],
    grid: tuple[int, int],
    dtype: torch.dtype,  # noqa: ARG001 - of matrices that are not made
) -> Links:
    return Links(token_of_cell, num_tokens, cell_grid, grid, None, None)
