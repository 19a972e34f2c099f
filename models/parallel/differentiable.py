"""Messages that gradients travel back through.

What a rank computes from others' tensors counts in the loss of the whole: the gradient of a sum over ranks is the sum
of the ranks' gradients, and that of an exchange is the exchange back.

Every rank has to build the same graph: backward sends messages too, and in the order that forward had.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.parallel.collectives import Communicator


def sum_ranks(x: Tensor, ranks: Communicator) -> Tensor:
    """Add up the tensors of all ranks."""
    return _Sum.apply(x, ranks)  # type: ignore[no-untyped-call]


def exchange(x: Tensor, ranks: Communicator) -> Tensor:
    """Send row g to rank g: (G, …) → (G, …)."""
    return exchange_rows(x, ranks, [1] * ranks.size, [1] * ranks.size)


def exchange_rows(x: Tensor, ranks: Communicator, num_sent: Sequence[int], num_received: Sequence[int]) -> Tensor:
    """Send rows to every rank, as `Communicator.exchange_rows` does."""
    return _ExchangeRows.apply(x, ranks, num_sent, num_received)  # type: ignore[no-untyped-call]


def gather(x: Tensor, ranks: Communicator) -> Tensor:
    """Send to all ranks: (…) → (G, …)."""
    return _Gather.apply(x, ranks)  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Communicator) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(x).wait().view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradient).wait(), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ranks: Communicator, num_sent: Sequence[int], num_received: Sequence[int]
    ) -> Tensor:
        ctx.settings = ranks, num_sent, num_received
        received = ranks.exchange_rows(x, num_sent, num_received).wait()
        return received.view_as(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ranks, num_sent, num_received = ctx.settings
        return ranks.exchange_rows(gradient, num_received, num_sent).wait(), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Communicator) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(x).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.exchange(gradient).wait().sum(dim=0), None
