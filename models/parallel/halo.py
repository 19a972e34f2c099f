"""Convolutions over tokens that are spread over ranks: each rank borrows its neighbours' outermost tokens.

Deliberately absent: halos wider than a rank's tokens, which would come from further away; dilation.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.parallel.collectives import Communicator
from models.parallel.differentiable import exchange_rows


def borrow_tokens(x: Tensor, ranks: Communicator, *, dim: int, left: int, right: int) -> Tensor:
    """Put the neighbours' tokens beside this rank's; zeros beyond the ends of the sequence.

    Args:
        x: tokens along `dim`, as many on all ranks.
        ranks: in order of their tokens.
        dim: of the tokens.
        left, right: how many to borrow from the rank before and the one behind.
    Returns: left + N + right tokens.
    Raises: ValueError if a rank has fewer tokens than its neighbour needs, before any message; RankLost.
    """
    x = x.movedim(dim, 0)
    if len(x) < max(left, right):
        raise ValueError(
            f"{len(x)} tokens on each of {ranks.size} ranks; a convolution borrows {max(left, right)} from its "
            f"neighbour; spread the sequence over fewer ranks"
        )
    num_sent, num_received = [0] * ranks.size, [0] * ranks.size
    before, behind = [], []  # zeros where there is no neighbour
    sent = []
    if ranks.rank > 0:
        num_sent[ranks.rank - 1], num_received[ranks.rank - 1] = right, left
        sent.append(x[:right])
    else:
        before.append(x.new_zeros(left, *x.shape[1:]))
    if ranks.rank < ranks.size - 1:
        num_sent[ranks.rank + 1], num_received[ranks.rank + 1] = left, right
        sent.append(x[len(x) - left :])
    else:
        behind.append(x.new_zeros(right, *x.shape[1:]))
    received = exchange_rows(torch.cat(sent) if sent else x[:0], ranks, num_sent, num_received)
    from_before = num_received[ranks.rank - 1] if ranks.rank > 0 else 0
    parts = (*before, received[:from_before], x, received[from_before:], *behind)
    return torch.cat(parts).movedim(0, dim)


def spread_convolution(conv: nn.Conv1d | nn.Conv2d, ranks: Communicator) -> None:
    """Make a convolution see the neighbours' tokens along its first dimension of space; weights stay as they are.

    Args:
        conv: (B, channels, tokens, …) → (B, channels, tokens / stride, …), with zeros for padding.
        ranks: in order of their tokens, as many on all and a multiple of the stride.
    Raises: ValueError if the convolution does not keep tokens / stride in the middle, or is dilated.
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    if not isinstance(padding, int) or conv.dilation[0] != 1 or kernel != 2 * padding + 1:
        raise ValueError(
            f"kernel_size={kernel}, padding={padding} and dilation={conv.dilation[0]} must be 2·p + 1, p and 1"
        )
    left = -(-padding // stride) * stride  # whole strides, so that outputs stay where they are
    right = max(0, padding - stride + 1)

    def borrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return borrow_tokens(args[0], ranks, dim=2, left=left, right=right), *args[1:]

    def trim(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        num_tokens = (args[0].shape[2] - left - right) // stride
        return out.narrow(2, left // stride, num_tokens)

    conv.register_forward_pre_hook(borrow)
    conv.register_forward_hook(trim)
