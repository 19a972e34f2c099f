"""Dynamic tokens as pure functions: density-peak clustering, merging, and the exchange between tokens and maps.

A dynamic token stands for some of the M cells of a fixed grid, in any shape; `token_of_cell` (B, M) says which. Where
it is None, every cell is its own token. Convolutions work on maps that are as fine as the cells or coarser.

Source: Zeng et al. 2022, "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering Transformer",
sections 3.2 and 3.3, with the official code (github.com/zengwang430521/TCFormer @1ea72a8); Du et al. 2016 for DPC-KNN.
Differs: sparse matrices became dense ones where they are small and rows that are gathered and added where not;
distances are squared until they are reported; nothing is drawn at random.
Deliberately absent: gradients through the clustering; fewer tokens for plain pictures, as all shapes are static.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from models.clustering import take_rows
from models.layers import map_to_tokens, tokens_to_map

Grid = tuple[int, int]

EPS = 1e-6  # added to every sum of weights, as the official code does
NOISE_SCALE = 1e-6  # official code, `cluster_dpc_knn`
# N·P over M up to which one dense matrix product beats gathering and adding cells: at 224 px 196² of 3136 cells do, but
# 784² of them take four times as long as their cells.
LINKS_PER_CELL = 64
SPLIT_FROM = 4096  # tokens from which no N² matrix is made
MAX_ROWS = 512  # tokens that are compared with all others at once: what is made of their pairs stays in the cache
MAX_PAIRS = 1 << 23  # pairs of tokens that are compared at once

# Distances are asked for block of rows by block of rows: slice of the rows and their squares (B, rows, N).
_Blocks = Callable[[], Iterator[tuple[slice, Tensor]]]


class DensityPeaks(NamedTuple):
    """Result of `dpc_knn`.

    Attributes:
        clusters: (B, N) int64 in [0, C).
        centers: (B, C) int64, token in the middle of each cluster, highest score first; center c is in cluster c.
        nearest: (B, N, K) distances to the nearest neighbours, the token itself included, rising up to rounding.
        density: (B, N), in [0, 1] without noise.
        scores: (B, N), density times the distance to the next denser token.
    """

    clusters: Tensor
    centers: Tensor
    nearest: Tensor
    density: Tensor
    scores: Tensor


def dpc_knn(
    x: Tensor,
    *,
    num_clusters: int,
    num_neighbors: int = 5,
    is_neighbor: Tensor | None = None,
    is_real: Tensor | None = None,
    noise: Tensor | None = None,
) -> DensityPeaks:
    """Cluster tokens around density peaks: dense tokens far from denser ones become centers, the others join them.

    Always in float32 or wider, and without gradient. Distances are Euclidean, divided by √E. From `SPLIT_FROM` tokens
    on they are computed in blocks of at most `MAX_PAIRS` and twice, so that memory stays linear in N.

    Args:
        x: (B, N, E).
        num_clusters: C ≤ N.
        num_neighbors: K; a token counts among its own neighbours; N where there are fewer.
        is_neighbor: (B, N) bool; the other tokens are farther from everybody than any pair is and join cluster 0.
        is_real: (B, N) bool; the others have no density, so that they are centers last.
        noise: (B, N) in [0, 1), breaks ties of density as the official code does; for parity only.
    Returns: clusters and what they were made from; equal scores, and equal distances, go to the lower index.
    Source: official code, `cluster_dpc_knn`. Differs: "farther than any pair" looks at the pairs of the sample, not of
        the whole batch; this only shows in the score of a sample's densest token, which is the first center anyway.
    """
    with torch.no_grad(), _full_precision(x.device.type):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x - x.mean(dim=1, keepdim=True)  # near the origin less is lost to rounding
        E = x.shape[2]
        rows, columns = _distance_factors(x)
        blocks = _square_distances(rows, columns)
        if is_neighbor is not None:
            blocks = _hide_columns(blocks, is_neighbor, E)

        K = min(num_neighbors, x.shape[1])
        found = [(*_nearest(x, square, part, K, is_neighbor), square.amax(dim=(1, 2))) for part, square in blocks()]
        nearest = torch.cat([square for square, _, _ in found], dim=1)  # (B, N, K), squared
        index = torch.cat([index for _, index, _ in found], dim=1)
        farthest = torch.stack([square for _, _, square in found]).amax(dim=0)[:, None, None]
        crowding = -nearest.mean(dim=-1) / E  # orders as the density, which is rounded to 1 where tokens are alike
        density = crowding.exp()
        if noise is not None:
            crowding = density = density + noise * NOISE_SCALE
        if is_real is not None:
            crowding, density = crowding.masked_fill(~is_real, -torch.inf), density * is_real

        separation = torch.cat([_to_denser(square, crowding, part, farthest) for part, square in blocks()], dim=1)
        separation = _to_denser_neighbor(nearest, index, crowding, separation)
        scores = (separation.clamp(min=0) / E).sqrt() * density
        centers = _highest(scores, num_clusters)
        return DensityPeaks(_join(rows, columns, centers, is_neighbor), centers, (nearest / E).sqrt(), density, scores)


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Keep autocast away: in half precision distances, and with them clusters, are others."""
    has_autocast = torch.amp.is_autocast_available(device_type)  # not so on the meta device
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


def _distance_factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two (B, N, E + 2) whose rows' products are squared distances: one matrix product makes all of them."""
    norms = x.square().sum(dim=-1, keepdim=True)
    ones = torch.ones_like(norms)
    return torch.cat((-2 * x, norms, ones), dim=-1), torch.cat((x, ones, norms), dim=-1)


def _square_distances(rows: Tensor, columns: Tensor) -> _Blocks:
    """Squared distances of all pairs; self-distances are rounding noise around 0, negative too."""
    N = rows.shape[1]
    step = max(min(MAX_PAIRS // N, MAX_ROWS), 1)
    parts = [slice(start, min(start + step, N)) for start in range(0, N, step)]
    if N < SPLIT_FROM:
        kept = [(part, rows[:, part] @ columns.mT) for part in parts]
        return lambda: iter(kept)
    return lambda: ((part, rows[:, part] @ columns.mT) for part in parts)


def _hide_columns(blocks: _Blocks, is_neighbor: Tensor, dim: int) -> _Blocks:
    """Put some tokens at a distance that is 1 more than the largest of their sample."""
    farthest = torch.stack([square.amax(dim=(1, 2)) for _, square in blocks()]).amax(dim=0)
    hidden = (((farthest / dim).sqrt() + 1).square() * dim)[:, None, None]
    return lambda: ((part, torch.where(is_neighbor[:, None], square, hidden)) for part, square in blocks())


def _nearest(
    x: Tensor, square: Tensor, part: slice, num_neighbors: int, is_neighbor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Find the nearest tokens of each row: squared distances, from differences, and indices, (B, rows, K) both.

    A product of matrices rounds by as much as two tokens of one colour are apart, and every library in its own way:
    clusters made of such numbers would be others in the exported program.
    """
    found = square.topk(num_neighbors, largest=False)
    others = take_tokens(x, found.indices.flatten(1)).unflatten(1, (-1, num_neighbors))  # (B, rows, K, E)
    exact = (others - x[:, part, None]).square().sum(dim=-1)
    if is_neighbor is not None:
        is_seen = is_neighbor.gather(1, found.indices.flatten(1)).unflatten(1, (-1, num_neighbors))
        exact = torch.where(is_seen, exact, found.values)
    return exact, found.indices


def _to_denser(square: Tensor, crowding: Tensor, part: slice, farthest: Tensor) -> Tensor:
    """Squared distance of each row to the nearest token of strictly higher density, the farthest where none is."""
    is_denser = crowding[:, None] > crowding[:, part, None]  # (B, rows, N)
    return torch.where(is_denser, square, farthest).amin(dim=-1)


def _to_denser_neighbor(nearest: Tensor, index: Tensor, crowding: Tensor, separation: Tensor) -> Tensor:
    """Replace what is known from differences: where a neighbour is denser, no other denser token is nearer."""
    is_denser = crowding.gather(1, index.flatten(1)).unflatten(1, index.shape[1:]) > crowding[..., None]  # (B, N, K)
    exact = torch.where(is_denser, nearest, torch.inf).amin(dim=-1)
    return torch.where(is_denser.any(dim=-1), exact, separation)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Find the highest scores of each sample in falling order, equal ones in order of index: (B, count) int64."""
    if torch.compiler.is_exporting():
        return scores.topk(
            count
        ).indices  # ONNX, which has no stable sort, lets the lower index win here; torch does not
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _join(rows: Tensor, columns: Tensor, centers: Tensor, is_neighbor: Tensor | None) -> Tensor:
    """Find the nearest center of each token: (B, N) int64."""
    N, C = rows.shape[1], centers.shape[1]
    step = N if N < SPLIT_FROM else max(MAX_PAIRS // C, 1)
    middle = take_tokens(columns, centers).mT  # (B, E + 2, C)
    clusters = torch.cat([(part @ middle).argmin(dim=-1) for part in rows.split(step, dim=1)], dim=1)
    if is_neighbor is not None:
        clusters = clusters * is_neighbor
    # A center whose twin ranks higher would join the twin and leave its own cluster empty.
    return clusters.scatter(1, centers, torch.arange(C, device=rows.device).expand_as(centers))


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens of each sample: x (B, N, E), index (B, M) int64 in [0, N) → (B, M, E)."""
    return take_rows(x[:, None], index[:, None])[:, 0]


def weighted_means(x: Tensor, weights: Tensor, groups: Tensor, *, num_groups: int) -> tuple[Tensor, Tensor]:
    """Average tokens group by group.

    Args:
        x: (B, N, E).
        weights: (B, N), not negative.
        groups: (B, N) int64 in [0, num_groups).
        num_groups: G.
    Returns: means (B, G, E), zeros for an empty group, and sums of weights + EPS (B, G).
    """
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))  # half precision loses tokens in long sums
    sums = add_rows(x * weights[..., None], groups, num_groups=num_groups)
    totals = add_rows(weights[..., None], groups, num_groups=num_groups) + EPS
    return (sums / totals).to(x.dtype), totals.squeeze(-1)


def means(x: Tensor, groups: Tensor, *, num_groups: int) -> Tensor:
    """Average tokens group by group, all with the same weight: as `weighted_means`, (B, G, E)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    counts = add_rows(torch.ones_like(wide[..., :1]), groups, num_groups=num_groups)
    return (add_rows(wide, groups, num_groups=num_groups) / (counts + EPS)).to(x.dtype)


def add_rows(x: Tensor, groups: Tensor, *, num_groups: int) -> Tensor:
    """Add up tokens group by group: x (B, M, E), groups (B, M) int64 in [0, G) → (B, G, E)."""
    B, _, E = x.shape
    firsts = torch.arange(B, device=x.device)[:, None] * num_groups
    rows, flat = (groups + firsts).flatten(), x.flatten(0, 1)
    sums = flat.new_zeros(B * num_groups, E)
    if torch.compiler.is_exporting():
        sums = sums.index_put((rows,), flat, accumulate=True)  # ScatterND; ONNX's scatter_add takes number by number
    else:
        sums = sums.scatter_add(0, rows[:, None].expand_as(flat), flat)  # torch's index_put is slower
    return sums.unflatten(0, (B, num_groups))


def merge_tokens(
    x: Tensor,
    weights: Tensor,
    clusters: Tensor,
    token_of_cell: Tensor | None,
    cell_weights: Tensor | None,
    *,
    num_clusters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the tokens of each cluster into their weighted mean.

    Args:
        x: (B, N, E).
        weights: (B, N), positive.
        clusters: (B, N) int64 in [0, C).
        token_of_cell: (B, M) int64 in [0, N), or None.
        cell_weights: (B, M), how much a cell weighs in its token; None is 1.
        num_clusters: C.
    Returns: tokens (B, C, E), `token_of_cell` and `cell_weights` of them.
    Source: official code, `merge_tokens`, whose division of the weights by their maximum has no effect either.
    """
    merged, totals = weighted_means(x, weights, clusters, num_groups=num_clusters)
    shares = weights / totals.gather(1, clusters)
    if token_of_cell is not None:
        clusters, shares = clusters.gather(1, token_of_cell), shares.gather(1, token_of_cell)
    return merged, clusters, shares if cell_weights is None else cell_weights * shares


def token_downup(
    x: Tensor, token_of_cell: Tensor | None, target_of_cell: Tensor, target_weights: Tensor, *, num_targets: int
) -> Tensor:
    """Carry tokens over to other tokens of the same cells.

    Args:
        x: (B, N, E), the source.
        token_of_cell: (B, M) int64, token of the source that each cell is in, or None.
        target_of_cell: (B, M) int64, the same of the target.
        target_weights: (B, M), how much a cell weighs in its target.
        num_targets: N of the target.
    Returns: (B, num_targets, E), weighted means over the cells of each target.
    Source: official code, `token_downup`.
    """
    cells = x if token_of_cell is None else take_tokens(x, token_of_cell)
    return weighted_means(cells, target_weights, target_of_cell, num_groups=num_targets)[0]


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
        return (x.mT @ links.to_map.to(x.dtype)).unflatten(2, links.grid)
    cells = x if links.token_of_cell is None else take_tokens(x, links.token_of_cell)
    if links.grid != links.cell_grid:
        place = grid_index(links.cell_grid, links.grid, device=x.device).expand(x.shape[0], -1)
        cells = means(cells, place, num_groups=links.grid[0] * links.grid[1])
    return tokens_to_map(cells, links.grid)


def map2token(fmap: Tensor, links: Links) -> Tensor:
    """Read tokens off a map: each token is the mean over its cells of the map.

    Args:
        fmap: (B, E, Y, X).
        links: of the tokens and this map.
    Returns: (B, N, E).
    Source: official code, `map2token`, where cells count the same whatever their weight in the token.
    """
    if links.to_tokens is not None:
        return links.to_tokens.to(fmap.dtype) @ map_to_tokens(fmap)
    cells = map_to_tokens(fmap)
    if links.grid != links.cell_grid:
        cells = cells.index_select(1, grid_index(links.cell_grid, links.grid, device=fmap.device))
    return cells if links.token_of_cell is None else means(cells, links.token_of_cell, num_groups=links.num_tokens)


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
