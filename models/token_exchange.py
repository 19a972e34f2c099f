"""Exchange of features between dynamic tokens and maps, on which convolutions work.

Maps are as fine as the cells that tokens are made of, or coarser.

Source: Zeng et al. 2022 (TCFormer), section 3.3, with the official code (github.com/zengwang430521/TCFormer @1ea72a8).
Differs: sparse matrices became dense ones where they are small, and rows that are gathered and added where not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.token_merging import EPS, means, take_tokens

Grid = tuple[int, int]

# N·P over M up to which one dense matrix product beats gathering and adding cells: at 224 px 196² of 3136 cells do, but
# 784² of them take four times as long as their cells.
LINKS_PER_CELL = 64


class Links(NamedTuple):
    """How the N tokens of a picture and the P cells of a map overlap; one serves all layers that share both.

    Attributes:
        token_of_cell: (B, M) int64, or None.
        num_tokens: N.
        cell_grid: (Y, X) with M = Y·X.
        grid: (Y, X) of the map, P = Y·X.
        to_map: (B, N, P), share of each token in each map cell; columns sum to 1. None: tokens are gathered instead.
        to_tokens: (B, N, P), share of each map cell in each token; rows sum to 1. None as above.
    """

    token_of_cell: Tensor | None
    num_tokens: int
    cell_grid: Grid
    grid: Grid
    to_map: Tensor | None
    to_tokens: Tensor | None


def link_tokens(
    token_of_cell: Tensor | None, *, num_tokens: int, cell_grid: Grid, grid: Grid, dtype: torch.dtype = torch.float32
) -> Links:
    """Prepare the exchange between tokens and a map.

    Args:
        token_of_cell: (B, M) int64 in [0, N), or None.
        num_tokens: N.
        cell_grid: (Y, X) of the cells.
        grid: (Y, X) of the map, not finer in either direction.
        dtype: of the shares, no narrower than that of the tokens.
    Raises: ValueError if the map is finer than the cells.
    """
    if grid[0] > cell_grid[0] or grid[1] > cell_grid[1]:
        raise ValueError(f"a map of {grid} cells is finer than the {cell_grid} cells that tokens are made of")
    P = grid[0] * grid[1]
    if token_of_cell is None or num_tokens * P > LINKS_PER_CELL * token_of_cell.shape[1]:
        return Links(token_of_cell, num_tokens, cell_grid, grid, None, None)
    place = grid_index(cell_grid, grid, device=token_of_cell.device)
    pairs = token_of_cell * P + place  # (B, M), distinct for each pair of token and map cell
    ones = torch.ones_like(pairs, dtype=dtype)
    counts = ones.new_zeros(pairs.shape[0], num_tokens * P).scatter_add(1, pairs, ones).unflatten(1, (num_tokens, P))
    to_map, to_tokens = (counts / (counts.sum(dim=dim, keepdim=True) + EPS) for dim in (1, 2))
    return Links(token_of_cell, num_tokens, cell_grid, grid, to_map, to_tokens)


def token2map(x: Tensor, links: Links) -> Tensor:
    """Draw tokens on a map: each map cell is the mean of its cells' tokens.

    Args:
        x: (B, N, E).
        links: of these tokens and the map.
    Returns: (B, E, Y, X).
    Source: official code, `token2map`.
    """
    if links.to_map is not None:
        drawn = links.to_map.to(x.dtype).mT @ x  # (B, P, E)
    elif links.grid == links.cell_grid:
        drawn = x if links.token_of_cell is None else take_tokens(x, links.token_of_cell)
    else:
        drawn = _average_cells(x, links)
    return drawn.unflatten(1, links.grid).permute(0, 3, 1, 2)  # one transpose, which programs have convolutions do


def _average_cells(x: Tensor, links: Links) -> Tensor:
    """Average the tokens (B, N, E) of the cells that are one cell of a coarser map: (B, P, E)."""
    (Y, X), (rows, columns) = links.grid, links.cell_grid
    if rows % Y or columns % X:
        cells = x if links.token_of_cell is None else take_tokens(x, links.token_of_cell)
        place = grid_index(links.cell_grid, links.grid, device=x.device).expand(x.shape[0], -1)
        return means(cells, place, num_groups=Y * X)
    cells = torch.arange(rows * columns, device=x.device).expand(x.shape[0], -1)
    token = cells if links.token_of_cell is None else links.token_of_cell
    blocks = token.unflatten(1, (Y, rows // Y, X, columns // X))
    parts = [
        take_tokens(x, blocks[:, :, row, :, column].flatten(1))
        for row in range(rows // Y)
        for column in range(columns // X)
    ]
    return sum(parts[1:], parts[0]) / (len(parts) + EPS)


def map2token(fmap: Tensor, links: Links) -> Tensor:
    """Read tokens off a map: each token is the mean over its cells of the map.

    Args:
        fmap: (B, E, Y, X).
        links: of the tokens and this map.
    Returns: (B, N, E).
    Source: official code, `map2token`, where cells count the same whatever their weight in the token.
    """
    if links.to_tokens is not None:
        return links.to_tokens.to(fmap.dtype) @ _view_as_tokens(fmap)
    cells = _view_as_tokens(fmap)
    if links.grid != links.cell_grid:
        cells = cells.index_select(1, grid_index(links.cell_grid, links.grid, device=fmap.device))
    return cells if links.token_of_cell is None else means(cells, links.token_of_cell, num_groups=links.num_tokens)


def _view_as_tokens(fmap: Tensor) -> Tensor:
    return fmap.permute(0, 2, 3, 1).flatten(1, 2)  # one transpose, as in `token2map`


def grid_index(cell_grid: Grid, grid: Grid, *, device: torch.device | None = None) -> Tensor:
    """Find the map cell of every cell: (M,) int64, row-major in both grids.

    Source: official code, `get_grid_index`: nearest interpolation.
    """
    rows, columns = (_block_index(cells, blocks, device) for cells, blocks in zip(cell_grid, grid, strict=True))
    return (rows[:, None] * grid[1] + columns).flatten()


def _block_index(num_cells: int, num_blocks: int, device: torch.device | None) -> Tensor:
    """Find the block of every cell in a row of cells, rounding as torch's nearest interpolation does."""
    # In float32, not in whole numbers: of 122 cells in 16 blocks, cell 61 stands at 7.9999995 instead of 8.
    places = torch.arange(num_cells, device=device, dtype=torch.float32) * (num_blocks / num_cells)
    return places.long()
