"""Batching: waiting samples → one batch → one result per sample.

Which samples make a batch is `sample_queue.py`'s business. Here requests are admitted, batches run and answers given:
the future of a `Ticket` lives on the event loop, everything else happens on other threads, which hand results back in
one wake-up of the loop per batch.
"""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from service.collate import pad, stack
from service.errors import DeadlineExceeded, ModelFailed, NotReady, Overloaded, ServiceError
from service.metrics import ModelMetrics
from service.sample import Arrays, Sample
from service.sample_queue import Clock, SampleQueue, Waiting
from service.ticket import Ticket

logger = logging.getLogger(__name__)


class Program(Protocol):
    """What the batcher needs of a runtime."""

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; blocks; several threads may call it at once; gives only the outputs named."""
        ...


class Batcher:
    """The queue and the workers of one endpoint.

    Args:
        program: runs a batch.
        metrics: of the model.
        max_batch: most samples in a batch.
        max_queue: most accepted requests without an answer; one more is refused.
        max_wait_seconds, buckets, short_length: as in `SampleQueue`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        program: Program,
        metrics: ModelMetrics,
        *,
        max_batch: int,
        max_queue: int,
        max_wait_seconds: float = 0.0,
        buckets: Sequence[int] = (),
        short_length: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._program, self._metrics, self._clock = program, metrics, clock
        self._max_queue = max_queue
        self._queue = SampleQueue(
            max_batch=max_batch,
            max_wait_seconds=max_wait_seconds,
            buckets=buckets,
            short_length=short_length,
            clock=clock,
        )
        self._collate = pad if buckets else stack
        self._open: set[Ticket] = set()  # accepted, without an answer
        self._is_draining = False
        self._workers: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drained: asyncio.Event | None = None
        self._seconds_per_sample = 0.01  # moving average, for Retry-After
        metrics.queue_limit.set(max_queue)

    # On the event loop

    def start(self, num_workers: int, cores: Sequence[int] = ()) -> None:
        """Start the workers; call on the event loop that `admit` will be called on.

        Args:
            num_workers: how many batches may run at once.
            cores: as many, the CPU core that each worker keeps to; empty leaves that to the operating system.
        """
        self._loop = asyncio.get_running_loop()
        self._drained = asyncio.Event()
        self._metrics.workers.set(num_workers)
        self._queue.num_workers += num_workers
        for index in range(num_workers):
            core = cores[index] if cores else None
            worker = threading.Thread(target=self._work, args=(core,), name=f"worker-{index}", daemon=True)
            worker.start()
            self._workers.append(worker)

    def admit(self, timeout_seconds: float) -> Ticket:
        """Accept a request, before any work is done for it.

        Args:
            timeout_seconds: after which it is answered with `DeadlineExceeded` and its work is dropped.
        Returns: a ticket whose future gets the result of `put`'s `finish`, or an error.
        Raises: NotReady while draining; Overloaded if the queue is full.
        """
        if self._is_draining:
            raise NotReady("the service is stopping; it takes no new requests; try another instance or later")
        if len(self._open) >= self._max_queue:
            seconds = max(1, math.ceil(len(self._open) * self._seconds_per_sample))
            raise Overloaded(
                f"{len(self._open)} requests are waiting; at most {self._max_queue} may; try again in {seconds} s",
                retry_after_seconds=seconds,
            )
        assert self._loop is not None, "start comes before admit"
        ticket = Ticket(future=self._loop.create_future(), deadline=self._clock() + timeout_seconds)
        timer = self._loop.call_later(timeout_seconds, self._expire, ticket, timeout_seconds)
        ticket.future.add_done_callback(lambda _: self._leave(ticket, timer))
        self._open.add(ticket)
        self._metrics.queue_depth.inc()  # not set: a bundle and the one that replaces it share the gauge for a while
        return ticket

    async def drain(self) -> None:
        """Refuse new requests and return once every accepted one has its answer."""
        self._is_draining = True
        assert self._drained is not None, "start comes before drain"
        if self._open:
            await self._drained.wait()

    def give_up(self) -> None:
        """Answer every accepted request with `NotReady`: the time to drain is over."""
        self._settle([(ticket, _stopped()) for ticket in self._open])

    def close(self) -> None:
        """Let the workers end once they have finished the batch in hand; nothing may be put afterwards."""
        self._queue.close()
        for worker in self._workers:
            worker.join()

    def _expire(self, ticket: Ticket, timeout_seconds: float) -> None:
        self._settle([(ticket, _deadline_exceeded(timeout_seconds))])

    def _leave(self, ticket: Ticket, timer: asyncio.TimerHandle) -> None:
        ticket.is_dead = True
        timer.cancel()
        self._open.discard(ticket)
        self._metrics.queue_depth.dec()
        if ticket.future.cancelled():
            self._metrics.abandoned.inc()
        elif isinstance(ticket.future.exception(), DeadlineExceeded):
            self._metrics.expired.inc()
        if self._is_draining and not self._open and self._drained is not None:
            self._drained.set()

    def _settle(self, answers: Sequence[tuple[Ticket, Any]]) -> None:
        for ticket, answer in answers:
            if ticket.future.done():
                continue
            if isinstance(answer, BaseException):
                ticket.future.set_exception(answer)
            else:
                ticket.future.set_result(answer)

    # On any thread

    def put(self, ticket: Ticket, sample: Sample, outputs: tuple[str, ...], finish: Callable[[Arrays], Any]) -> None:
        """Queue a decoded sample.

        Args:
            ticket: of the request.
            sample: what to run.
            outputs: which of the program's outputs it needs.
            finish: turns its outputs, without batch dimension, into the answer; runs on the worker. Padding is not cut
                off: how long an output is for a sample of some length, only the task knows.
        """
        self._queue.put(ticket, sample, outputs, finish)

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """Answer a ticket with an error."""
        self._answer([(ticket, error)])

    def is_wanted(self, ticket: Ticket) -> bool:
        """Whether somebody still waits for this ticket's answer."""
        return ticket.is_wanted(self._clock())

    def _answer(self, answers: Sequence[tuple[Ticket, Any]]) -> None:
        assert self._loop is not None, "start comes first"
        self._loop.call_soon_threadsafe(self._settle, answers)

    # On a worker

    def _work(self, core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(threading.get_native_id(), {core})
        while (batch := self._queue.take()) is not None:
            with self._metrics.batches_in_flight.track_inprogress():
                self.run(*batch)

    def run(self, batch: Sequence[Waiting], bucket: int) -> None:
        """Run a batch and answer all its tickets in one wake-up of the event loop; never raises."""
        try:
            answers = self._run(batch)
        except ServiceError as error:
            answers = [(waiting.ticket, error) for waiting in batch]
        except Exception as error:  # the border of the worker: the error belongs to this batch alone
            request_ids = [waiting.ticket.request_id for waiting in batch]
            logger.exception("batch failed", extra={"fields": {"request_ids": request_ids}})
            failure = ModelFailed("the model failed on this batch; the input may be sent again; tell the operator")
            failure.__cause__ = error
            answers = [(waiting.ticket, failure) for waiting in batch]
        self._queue.end(bucket)
        self._answer(answers)

    def _run(self, batch: Sequence[Waiting]) -> list[tuple[Ticket, Any]]:
        start = self._clock()
        samples = [waiting.sample for waiting in batch]
        names = tuple(dict.fromkeys(name for waiting in batch for name in waiting.outputs))
        arrays = self._program.run(self._collate(samples), names)
        ran = self._clock()
        self._observe(batch, start, ran)
        return [
            (waiting.ticket, self._finish(waiting, {name: arrays[name][row] for name in waiting.outputs}))
            for row, waiting in enumerate(batch)
        ]

    def _finish(self, waiting: Waiting, outputs: Arrays) -> Any:
        start = self._clock()
        try:
            return waiting.finish(outputs)
        except ServiceError as error:
            return error
        except Exception as error:  # one sample's fault stays its own
            logger.exception("postprocess failed", extra={"fields": {"request_id": waiting.ticket.request_id}})
            failure = ModelFailed("the model's answer could not be read; tell the operator")
            failure.__cause__ = error
            return failure
        finally:
            seconds = self._clock() - start
            waiting.ticket.times["postprocess"] = seconds
            self._metrics.postprocess_seconds.observe(seconds)
            if waiting.ticket.trace is not None:
                waiting.ticket.trace.add_stage("postprocess", start, start + seconds)

    def _observe(self, batch: Sequence[Waiting], start: float, ran: float) -> None:
        seconds = ran - start
        self._seconds_per_sample += 0.1 * (seconds / len(batch) / max(1, len(self._workers)) - self._seconds_per_sample)
        self._metrics.run_seconds.observe(seconds)
        self._metrics.batch_size.observe(len(batch))
        lengths = [waiting.sample.length for waiting in batch]
        self._metrics.batch_padding_ratio.observe(1.0 - sum(lengths) / (len(lengths) * max(lengths)))
        for waiting in batch:
            waiting.ticket.times |= {"queue": start - waiting.since, "run": seconds}
            self._metrics.queue_seconds.observe(start - waiting.since)
        if traced := [waiting for waiting in batch if waiting.ticket.trace is not None]:
            _trace(traced, start, ran, size=len(batch))


def _trace(traced: Sequence[Waiting], start: float, ran: float, *, size: int) -> None:
    """Add the spans of a batch that ran, which are linked to each other, and of the time in the queue."""
    traces = [waiting.ticket.trace for waiting in traced if waiting.ticket.trace is not None]
    span = traces[0].add_batch(traces, start, ran, size=size)
    for trace, waiting in zip(traces, traced, strict=True):
        trace.add_stage("queue", waiting.since, start)
        trace.add_stage("run", start, ran, batch=span)


def _stopped() -> NotReady:
    return NotReady("the service stopped before the answer was there; send it again, to another instance or later")


def _deadline_exceeded(timeout_seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"no answer within {timeout_seconds:g} s; the request was dropped; allow more time with "
        "X-Request-Timeout-Seconds or try again when the service is less busy"
    )
