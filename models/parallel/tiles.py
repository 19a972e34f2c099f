"""Attention of some queries to some of their keys, such that the parts add up to attention to all keys.

Works in float32 at least, whatever the inputs are, and tile by tile of queries: the scores of one tile are all that is
ever held. With a causal mask, keys that no query of a tile sees are not touched.

Source: Dao 2023 (FlashAttention-2), section 3.1, and Liu et al. 2023 (Ring Attention) for the sum of parts.
Deliberately absent: dropout, whose draws would depend on who computes what; fused kernels, which do not tell the
log-sum-exp on every device (torch's own gives zeros where it falls back to plain products).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS = 256  # with fewer, products are slow; with more, causal tiles see more keys that they mask
TILE_SCORES = 2**24  # 64 MiB in float32


class Sight(NamedTuple):
    """Who sees whom.

    Attributes:
        queries: (N,) int64 on the CPU, ascending positions.
        keys: (S,) int64 on the CPU, ascending positions.
        is_causal: whether a query sees no key of a later position.
        key_mask: (B, S) bool, True = real token; None where all are.
    """

    queries: Tensor
    keys: Tensor
    is_causal: bool
    key_mask: Tensor | None


class Heads(NamedTuple):
    """Tensors of one attention, or their gradients.

    Attributes:
        q: (B, H, J, N, D), J queries to each of the H heads of keys.
        k: (B, H, S, D).
        v: (B, H, S, E).
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Answer(NamedTuple):
    """Attention to the keys met so far.

    Attributes:
        out: (B, H, J, N, E), float32 at least; zeros without any key.
        lse: (B, H, J, N), log of the sum of the exponentials of their scores; -inf without any key.
    """

    out: Tensor
    lse: Tensor


class Tile(NamedTuple):
    """Queries [first, last), of whose keys the first `num_keys` are seen by some, not by all if `is_partial`."""

    first: int
    last: int
    num_keys: int
    is_partial: bool


def wide(x: Tensor) -> Tensor:
    """Cast to float32 unless x is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_answer(q: Tensor, value_dim: int) -> Answer:
    """Attention to no key at all, for q (B, H, J, N, D)."""
    out = wide(q.new_zeros(*q.shape[:-1], value_dim))
    return Answer(out, out.new_full(q.shape[:-1], -torch.inf))


def attend_tiles(heads: Heads, sight: Sight, answer: Answer, *, scale: float) -> None:
    """Add the attention to some keys to what is known of other keys.

    Args:
        heads: queries, and the keys and values that are added.
        sight: who sees whom.
        answer: attention to the keys before; changed in place.
        scale: of the dot products.
    """
    out, lse = answer
    k, v = wide(heads.k), wide(heads.v)
    for tile in tiles(sight, num_heads=heads.q.shape[:3].numel()):
        rows = slice(tile.first, tile.last)
        weights = _scores(heads.q[:, :, :, rows], k, sight, tile, scale=scale)
        # Scores are the largest tensors here and what takes the time: they are overwritten, not copied.
        highest = _or_zero(weights.amax(dim=-1))
        total = weights.sub_(highest[..., None]).exp_().sum(dim=-1)
        added = _by_key_head(weights, v[:, :, : tile.num_keys]) / total.masked_fill(total == 0, 1)[..., None]
        added_lse = highest + total.log()
        new_lse = torch.logaddexp(lse[..., rows], added_lse)
        base = _or_zero(new_lse)
        old_share, share = (lse[..., rows] - base).exp(), (added_lse - base).exp()
        out[..., rows, :] = out[..., rows, :] * old_share[..., None] + added * share[..., None]
        lse[..., rows] = new_lse


def attend_tiles_backward(
    heads: Heads, sight: Sight, answer: Answer, d_out: Tensor, gradients: Heads, *, scale: float
) -> None:
    """Add what some keys contribute to the gradients of attention to all keys.

    Args:
        heads, sight, scale: as in `attend_tiles`.
        answer: attention to all keys.
        d_out: (B, H, J, N, E), its gradient, float32 at least.
        gradients: float32 at least, those of k and v for these keys; changed in place.
    """
    k, v = wide(heads.k), wide(heads.v)
    for tile in tiles(sight, num_heads=heads.q.shape[:3].numel()):
        rows, keys = slice(tile.first, tile.last), slice(tile.num_keys)
        q, d_rows, lse = heads.q[:, :, :, rows], d_out[:, :, :, rows], answer.lse[..., rows]
        base = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query without keys has no weights
        weights = _scores(q, k, sight, tile, scale=scale).sub_(base[..., None]).exp_()
        delta = (d_rows * answer.out[:, :, :, rows]).sum(dim=-1, keepdim=True)
        d_scores = _by_key_head(d_rows, v[:, :, keys].transpose(-2, -1)).sub_(delta).mul_(weights).mul_(scale)
        gradients.q[:, :, :, rows] += _by_key_head(d_scores, k[:, :, keys])
        gradients.k[:, :, keys] += d_scores.flatten(2, 3).transpose(-2, -1) @ wide(q).flatten(2, 3)
        gradients.v[:, :, keys] += weights.flatten(2, 3).transpose(-2, -1) @ d_rows.flatten(2, 3)


def tiles(sight: Sight, *, num_heads: int) -> Iterator[Tile]:
    """Cut the queries into tiles that see at least one key.

    Args:
        sight: who sees whom; the key mask is not looked at.
        num_heads: of queries, batch included.
    """
    N, S = len(sight.queries), len(sight.keys)
    rows = min(TILE_ROWS, max(16, TILE_SCORES // (num_heads * S)))
    firsts = torch.arange(0, N, rows)
    lasts = (firsts + rows).clamp(max=N)
    seen_by_last, seen_by_first = torch.full_like(firsts, S), torch.full_like(firsts, S)
    if sight.is_causal:
        seen_by_last = torch.searchsorted(sight.keys, sight.queries[lasts - 1], right=True)
        seen_by_first = torch.searchsorted(sight.keys, sight.queries[firsts], right=True)
    columns = (firsts, lasts, seen_by_last, seen_by_first)
    for first, last, num_keys, num_seen_by_all in zip(*(column.tolist() for column in columns), strict=True):
        if num_keys:
            yield Tile(first, last, num_keys, num_seen_by_all < num_keys)


def _scores(q: Tensor, k: Tensor, sight: Sight, tile: Tile, *, scale: float) -> Tensor:
    """Scaled scores (B, H, J, rows, keys) of a tile, -inf where a query does not see the key."""
    scores = _by_key_head(wide(q) * scale, k[:, :, : tile.num_keys].transpose(-2, -1))
    if tile.is_partial:
        queries, keys = sight.queries[tile.first : tile.last], sight.keys[: tile.num_keys]
        scores.masked_fill_((queries[:, None] < keys).to(q.device), -torch.inf)
    if sight.key_mask is not None:
        scores.masked_fill_(~sight.key_mask[:, None, None, None, : tile.num_keys], -torch.inf)
    return scores


def _by_key_head(x: Tensor, y: Tensor) -> Tensor:
    """Multiply x (B, H, J, rows, …) with the y (B, H, …) of its key head; the J share one product."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _or_zero(lse: Tensor) -> Tensor:
    """Replace -inf, whose difference from itself is no number."""
    return lse.masked_fill(lse == -torch.inf, 0)
