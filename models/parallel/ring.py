"""Attention whose keys and values travel round a ring of ranks while each rank keeps its queries.

The next keys are on their way while those at hand are attended to. Backward, the gradients of keys and values travel
with them, in float32, and the last hop brings them home.

Source: Liu et al. 2023 (Ring Attention with Blockwise Transformers), section 3; `ring/` of the official USP code
(github.com/feifeibear/long-context-attention @56118e0).
Differs: the layout enters only as positions of queries and keys, so that one algorithm serves all of them; gradients of
every rank and step are held apart (official: in float32 they are added to a buffer that the next step overwrites).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.parallel.collectives import Communicator
from models.parallel.tiles import Answer, Heads, Sight, attend_tiles, attend_tiles_backward, no_answer


def ring_forward(heads: Heads, sights: Sequence[Sight], ring: Communicator, *, scale: float) -> Answer:
    """Attend to the keys of all ranks.

    Args:
        heads: of this rank; as many keys on all ranks.
        sights: for each rank's keys, which of them these queries see.
        ring: G ranks.
        scale: of the dot products.
    """
    q, k, v = heads
    answer = no_answer(q, v.shape[-1])
    held = _pack(k, v)
    for step in range(ring.size):
        is_last = step == ring.size - 1
        coming = None if is_last else ring.pass_on(held)
        attend_tiles(Heads(q, *_unpack(held, k, v)), sights[(ring.rank - step) % ring.size], answer, scale=scale)
        held = coming.wait() if coming else held
    return answer


def ring_backward(
    heads: Heads, sights: Sequence[Sight], answer: Answer, d_out: Tensor, ring: Communicator, *, scale: float
) -> Heads:
    """Gradients of `ring_forward`.

    Args:
        heads, sights, ring, scale: as there.
        answer: what it returned.
        d_out: gradient of its output, in its type.
    Returns: gradients, float32 at least.
    """
    q, k, v = heads
    d_q = torch.zeros_like(q, dtype=d_out.dtype)
    held, returning = _pack(k, v), None
    for step in range(ring.size):
        is_last = step == ring.size - 1
        coming = None if is_last else ring.pass_on(held)
        d_held = torch.zeros_like(held, dtype=d_out.dtype)
        attend_tiles_backward(
            Heads(q, *_unpack(held, k, v)),
            sights[(ring.rank - step) % ring.size],
            answer,
            d_out,
            Heads(d_q, *_unpack(d_held, k, v)),
            scale=scale,
        )
        if returning:  # what the ranks behind added to the gradients of the same keys
            d_held += returning.wait()
        returning = ring.pass_on(d_held)
        held = coming.wait() if coming else held
    assert returning is not None
    return Heads(d_q, *_unpack(returning.wait(), k, v))


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """Lay keys and values out as one message."""
    return torch.cat((k.flatten(), v.flatten()))


def _unpack(x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """View a message in the shapes of k and v."""
    return x[: k.numel()].view(k.shape), x[k.numel() :].view(v.shape)
