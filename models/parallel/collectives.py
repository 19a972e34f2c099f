"""Messages within one group of ranks: posted at once, waited for later, counted, and never waited for endlessly.

Source: torch.distributed, with gloo on the CPU and NCCL on GPUs.
Deliberately absent: gradients (`models.parallel.differentiable`), and mending a group that lost a rank: it is of no
further use, and all its processes have to be started again.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class RankLost(RuntimeError):
    """A rank of the group ended, or did not take part in time."""


class Communicator:
    """The messages of one rank to the others of its group.

    A message that a lost or late rank should have sent, or that waits for one that does, ends in `RankLost` on every
    rank that waits for it, at most `timeout_seconds` after it began to wait. A process that ends is noticed at once by
    those it has messages with. With NCCL, waiting is the stream's: there the group's own watchdog ends the process.

    Args:
        group: of the ranks; its own timeout is set to `timeout_seconds`. None is this process alone.
        timeout_seconds: longest wait for one message.

    Attributes:
        rank: of this process in the group.
        size: G, ranks in the group.
        bytes_sent: payload that left this rank for others, all messages together.
        seconds_waiting: what `Pending.wait` took, all messages together.
    Raises: ValueError if the timeout is not positive.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, timeout_seconds: float = 60.0) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds={timeout_seconds} must be above 0")
        self._group = group
        self._timeout = timedelta(seconds=timeout_seconds)
        self.rank, self.size = 0, 1
        if group is not None:
            group.set_timeout(self._timeout)
            self.rank, self.size = group.rank(), group.size()
        self.bytes_sent = 0
        self.seconds_waiting = 0.0

    def exchange(self, x: Tensor) -> "Pending":
        """Send row g to rank g: (G, …) → (G, …), whose row g came from rank g."""
        return self.exchange_rows(x, [1] * self.size, [1] * self.size)

    def exchange_rows(self, x: Tensor, num_sent: Sequence[int], num_received: Sequence[int]) -> "Pending":
        """Send rows to every rank, in order of rank.

        Args:
            x: (rows, …), `num_sent[g]` of them for rank g.
            num_sent, num_received: of each rank; what g receives from h must be what h sends to g.
        Returns: (rows received, …).
        """
        if self.size == 1:
            return Pending(self, x, ())
        x = x.contiguous()
        out = x.new_empty(sum(num_received), *x.shape[1:])
        row_bytes = x.shape[1:].numel() * x.element_size()
        self.bytes_sent += (sum(num_sent) - num_sent[self.rank]) * row_bytes
        splits = [n * row_bytes for n in num_received], [n * row_bytes for n in num_sent]
        with self._watch():
            work = dist.all_to_all_single(_as_bytes(out), _as_bytes(x), *splits, group=self._group, async_op=True)
        return Pending(self, out, (work,), x)

    def pass_on(self, x: Tensor) -> "Pending":
        """Send to the next rank of the ring what has the shape of x, and receive it from the previous one."""
        if self.size == 1:
            return Pending(self, x, ())
        x = x.contiguous()
        out = torch.empty_like(x)
        self.bytes_sent += x.nbytes
        with self._watch():
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, _as_bytes(x), group=self._group, group_peer=(self.rank + 1) % self.size),
                    dist.P2POp(dist.irecv, _as_bytes(out), group=self._group, group_peer=(self.rank - 1) % self.size),
                ]
            )
        return Pending(self, out, works, x)

    def gather(self, x: Tensor) -> "Pending":
        """Send to all ranks: (…) → (G, …), whose row g came from rank g."""
        if self.size == 1:
            return Pending(self, x[None], ())
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        self.bytes_sent += (self.size - 1) * x.nbytes
        with self._watch():
            rows = list(_as_bytes(out).chunk(self.size))
            work = dist.all_gather(rows, _as_bytes(x), group=self._group, async_op=True)
        return Pending(self, out, (work,), x)

    def sum(self, x: Tensor) -> "Pending":
        """Add up the tensors of all ranks; every rank gets the same bits."""
        if self.size == 1:
            return Pending(self, x, ())
        out = x.clone(memory_format=torch.contiguous_format)
        # Adding up parts and then gathering the sums: each is (G - 1) / G of the tensor.
        self.bytes_sent += 2 * (self.size - 1) * x.nbytes // self.size
        with self._watch():
            work = dist.all_reduce(out, group=self._group, async_op=True)
        return Pending(self, out, (work,))

    def wait(self, works: Sequence[dist.Work], device: torch.device) -> None:
        """Wait for messages.

        Raises: RankLost.
        """
        started = time.perf_counter()
        with self._watch():
            for work in works:
                if device.type == "cpu":
                    work.wait(self._timeout)
                else:
                    work.wait()
        self.seconds_waiting += time.perf_counter() - started

    @contextmanager
    def _watch(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self._group)
            raise RankLost(
                f"rank {ranks[self.rank]} got no answer from one of ranks {ranks}, which is lost or later than "
                f"{self._timeout.total_seconds()} s; every rank of the sequence has to be started again"
            ) from error


class Pending:
    """Messages under way, and the tensor that they fill.

    Args:
        ranks: to wait among.
        result: filled once they have arrived.
        works: the messages.
        sent: what is being sent, which must not be freed before.
    """

    def __init__(
        self, ranks: Communicator, result: Tensor, works: Sequence[dist.Work], sent: Tensor | None = None
    ) -> None:
        self._ranks = ranks
        self._result = result
        self._works = works
        self._sent = sent

    def wait(self) -> Tensor:
        """Wait until everything has arrived.

        Raises: RankLost.
        """
        self._ranks.wait(self._works, self._result.device)
        self._works, self._sent = (), None
        return self._result


def check_agreement(facts: dict[str, int], groups: Sequence[Communicator], *, device: torch.device) -> None:
    """See whether all ranks are about to do the same; otherwise their messages would not fit each other.

    Args:
        facts: the same names on every rank.
        groups: the axes of a mesh of ranks, the fastest first.
        device: of the messages.
    Raises: ValueError, on all ranks, if they have different numbers; RankLost.
    """
    known = torch.tensor(list(facts.values()), device=device)
    for ranks in groups:
        known = ranks.gather(known).wait()
    by_fact = known.reshape(-1, len(facts)).T.tolist()
    different = {name: values for name, values in zip(facts, by_fact, strict=True) if len(set(values)) > 1}
    if different:
        said = ", ".join(f"{name}={values}" for name, values in different.items())
        raise ValueError(f"ranks disagree (values in order of rank): {said}; all must pass the same")


def _as_bytes(x: Tensor) -> Tensor:
    """View contiguous x as bytes, so that messages are the same for every type."""
    return x.flatten().view(torch.uint8)
