"""Which tokens of a sequence each rank holds.

A sequence is spread over ring · ulysses ranks, rank = ring rank · ulysses + ulysses rank. The ulysses ranks of one ring
rank hold its tokens in consecutive parts, so that exchanging heads for tokens gives each of them the ring rank's tokens
in order. For causal attention "zigzag" and "stripe" give every ring rank the same work; without a causal mask every
layout does, and "basic" keeps neighbours together.

Every rank has the same number of slots. Where the length does not fill them, positions from the length on stand for
padding; a rank's positions ascend, so its padding comes last, and short sequences leave some ranks with nothing else.

Source: Fang and Zhao 2024, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI", algorithm 2,
and its official code (github.com/feifeibear/long-context-attention @56118e0), `comm/extract_local.py`.
Differs: lengths that the slots do not divide are padded (official: they end the processes or never return).
"""

from math import lcm
from typing import Literal, get_args

import torch
from torch import Tensor

Layout = Literal["basic", "zigzag", "stripe"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def padded_length(length: int, layout: Layout, *, ulysses: int, ring: int, num_segments: int = 1) -> int:
    """Slots of all ranks together.

    Args:
        length: tokens, at least 1.
        layout: see the file.
        ulysses, ring: degrees.
        num_segments: equal parts of consecutive tokens that no two ranks may share; see `models.parallel.clustered`.
    """
    multiple = lcm(ulysses * ring, 2 * ring if layout == "zigzag" else 1, num_segments)
    return -(-length // multiple) * multiple


def ring_positions(length: int, layout: Layout, *, ulysses: int, ring: int, num_segments: int = 1) -> Tensor:
    """Positions of the tokens that each ring rank holds, its ulysses ranks taken together.

    Args: as `padded_length`.
    Returns: (ring, S) int64 on the CPU, ascending rows; what is not below the length is padding.
    """
    num_slots = padded_length(length, layout, ulysses=ulysses, ring=ring, num_segments=num_segments)
    positions = torch.arange(num_slots)
    if layout == "basic":
        return positions.reshape(ring, -1)
    if layout == "stripe":
        return positions.reshape(-1, ring).T.contiguous()
    parts = positions.reshape(2 * ring, -1)
    return torch.cat((parts[:ring], parts[ring:].flip(0)), dim=1)


def shard_positions(length: int, layout: Layout, *, ulysses: int, ring: int, num_segments: int = 1) -> Tensor:
    """Positions of the slots of every rank: (ulysses · ring, slots of one rank) int64; see `ring_positions`."""
    positions = ring_positions(length, layout, ulysses=ulysses, ring=ring, num_segments=num_segments)
    return positions.reshape(ulysses * ring, -1)
