"""Batching: waiting samples → one batch → one result per sample.

One rule: a free worker takes what is waiting in the oldest sample's bucket, up to `max_batch`, leaving a share for
other free workers; only if `max_wait_seconds` > 0 it waits for more, never longer than that since the oldest sample
arrived, and leaves no share. Under load the device is the clock and nobody waits for a window. A batch of long samples
has fewer of them, and one worker never runs long samples, so that short ones need not wait for the end of one.

A `Ticket` is one accepted request. Its future lives on the event loop; everything else happens on other threads, which
hand results back in one wake-up of the loop per batch.
"""

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from service.collate import bucket_of, pad, scale_max_batch, stack
from service.errors import DeadlineExceeded, ModelFailed, NotReady, Overloaded, ServiceError
from service.metrics import ModelMetrics
from service.sample import Arrays, Sample

if TYPE_CHECKING:
    from service.tracing import Trace

logger = logging.getLogger(__name__)

Clock = Callable[[], float]


class Program(Protocol):
    """What the batcher needs of a runtime."""

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; blocks; several threads may call it at once; gives only the outputs named."""
        ...


@dataclass(slots=True, eq=False)
class Ticket:
    """One accepted request, from admission to answer.

    Attributes:
        future: the answer, on the event loop.
        deadline: time of the batcher's clock after which nobody wants the answer.
        is_dead: nobody waits for it, so work on it is dropped.
        times: stage → seconds, for the log.
        request_id: for the log.
        trace: gets a span for each stage, where there are traces.
    """

    future: "asyncio.Future[Any]"
    deadline: float
    is_dead: bool = False
    times: dict[str, float] = field(default_factory=dict)
    request_id: str = ""
    trace: "Trace | None" = None


@dataclass(slots=True, eq=False)
class _Waiting:
    ticket: Ticket
    sample: Sample
    outputs: tuple[str, ...]
    finish: Callable[[Arrays], Any]
    since: float


class Batcher:
    """The queue and the workers of one endpoint.

    Args:
        program: runs a batch.
        metrics: of the model.
        max_batch: most samples in a batch.
        max_queue: most accepted requests without an answer; one more is refused.
        max_wait_seconds: how long a free worker waits for a fuller batch.
        buckets: longest lengths that are batched together, ascending; empty where all samples have one shape.
        short_length: samples in buckets above it are long; None where there are none.
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
        self._max_batch, self._max_queue, self._max_wait = max_batch, max_queue, max_wait_seconds
        self._buckets = tuple(buckets)
        self._short_length = math.inf if short_length is None else short_length
        self._lock = threading.RLock()
        self._sleepers: list[threading.Condition] = []  # one for each sleeping worker, the latest last
        self._waiting: dict[int, deque[_Waiting]] = {}
        self._num_idle = 0
        self._num_long = 0  # batches of long samples that run
        self._open: set[Ticket] = set()  # accepted, without an answer
        self._is_draining = False
        self._is_closed = False
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
            cores: as many; the CPU core that each worker keeps to. None leaves that to the operating system.
        """
        self._loop = asyncio.get_running_loop()
        self._drained = asyncio.Event()
        self._metrics.workers.set(num_workers)
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
        with self._lock:
            self._is_closed = True
            for sleeper in self._sleepers:
                sleeper.notify()
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
        bucket = bucket_of(sample.length, self._buckets)
        with self._lock:
            waiting = _Waiting(ticket, sample, outputs, finish, self._clock())
            self._waiting.setdefault(bucket, deque()).append(waiting)
            if self._sleepers:
                # The latest one: waking workers in turn would move a lone stream of requests from core to core.
                self._sleepers.pop().notify()

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """Answer a ticket with an error."""
        self._answer([(ticket, error)])

    def is_wanted(self, ticket: Ticket) -> bool:
        """Whether somebody still waits for this ticket's answer."""
        return not ticket.is_dead and ticket.deadline > self._clock()

    def _answer(self, answers: Sequence[tuple[Ticket, Any]]) -> None:
        assert self._loop is not None, "start comes first"
        self._loop.call_soon_threadsafe(self._settle, answers)

    # On a worker

    def _work(self, core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(threading.get_native_id(), {core})
        while (batch := self.take()) is not None:
            with self._metrics.batches_in_flight.track_inprogress():
                self.run(*batch)

    def take(self) -> tuple[list[_Waiting], int] | None:
        """Wait for the next batch.

        Returns: its samples and its bucket; None once the batcher is closed.
        """
        with self._lock:
            self._num_idle += 1
            try:
                while not self._is_closed:
                    batch, seconds = self.choose()
                    if batch is not None:
                        return batch
                    self._sleep(seconds)
                return None
            finally:
                self._num_idle -= 1

    def _sleep(self, seconds: float | None) -> None:
        """Wait, with the lock held, until something is put or the time is over (None: for as long as it takes)."""
        sleeper = threading.Condition(self._lock)
        self._sleepers.append(sleeper)
        if not sleeper.wait(seconds):
            with suppress(ValueError):  # whoever notifies removes it
                self._sleepers.remove(sleeper)

    def choose(self) -> tuple[tuple[list[_Waiting], int] | None, float | None]:
        """Apply the rule above to what waits.

        Returns: a batch, or None and the seconds after which asking again is worth it (None: when something is put).
        """
        oldest: int | None = None
        takes_long = self._num_long < max(1, len(self._workers) - 1)
        for bucket, queue in self._waiting.items():
            while queue and not self.is_wanted(queue[0].ticket):
                queue.popleft()
            if (
                queue
                and (takes_long or not self._is_long(bucket))
                and (oldest is None or queue[0].since < self._waiting[oldest][0].since)
            ):
                oldest = bucket
        if oldest is None:
            return None, None
        queue = self._waiting[oldest]
        max_batch = scale_max_batch(self._max_batch, oldest, self._buckets)
        remaining = queue[0].since + self._max_wait - self._clock()
        if self._max_wait and len(queue) < max_batch and remaining > 0:
            return None, remaining
        # Who asked for a window wants full batches; and the rest that a share leaves would wait for a window again.
        num_takers = 1 if self._max_wait else max(1, self._num_idle)
        share = min(max_batch, math.ceil(len(queue) / num_takers))
        batch: list[_Waiting] = []
        while queue and len(batch) < share:
            waiting = queue.popleft()
            if self.is_wanted(waiting.ticket):
                batch.append(waiting)
        self._num_long += self._is_long(oldest)
        return (batch, oldest), None

    def _is_long(self, bucket: int) -> bool:
        return bucket > self._short_length

    def run(self, batch: Sequence[_Waiting], bucket: int) -> None:
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
        with self._lock:
            self._num_long -= self._is_long(bucket)
        self._answer(answers)

    def _run(self, batch: Sequence[_Waiting]) -> list[tuple[Ticket, Any]]:
        start = self._clock()
        samples = [waiting.sample for waiting in batch]
        names = tuple(dict.fromkeys(name for waiting in batch for name in waiting.outputs))
        arrays = self._program.run(pad(samples) if self._buckets else stack(samples), names)
        ran = self._clock()
        self._observe(batch, start, ran)
        return [
            (waiting.ticket, self._finish(waiting, {name: arrays[name][row] for name in waiting.outputs}))
            for row, waiting in enumerate(batch)
        ]

    def _finish(self, waiting: _Waiting, outputs: Arrays) -> Any:
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

    def _observe(self, batch: Sequence[_Waiting], start: float, ran: float) -> None:
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


def _trace(traced: Sequence[_Waiting], start: float, ran: float, *, size: int) -> None:
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
