"""Merging of dynamic tokens as pure functions: means of groups, and which token a cell is in afterwards.

A dynamic token stands for some of the M cells of a fixed grid, in any shape; `token_of_cell` (B, M) says which. Where
it is None, every cell is its own token.

Source: Zeng et al. 2022, "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering Transformer",
section 3.2, with the official code (github.com/zengwang430521/TCFormer @1ea72a8).
Deliberately absent: fewer tokens for plain pictures, as all shapes are static.
"""

import torch
from torch import Tensor

EPS = 1e-6  # added to every sum of weights, as the official code does


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens of each sample: x (B, N, E), index (B, M) int64 in [0, N) → (B, M, E)."""
    B, N, E = x.shape
    firsts = torch.arange(B, device=x.device)[:, None] * N
    # Of flattened tokens: `gather` would need an index as wide as they are, and its gradient is slow.
    return x.reshape(B * N, E).index_select(0, (index + firsts).flatten()).unflatten(0, index.shape)


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
