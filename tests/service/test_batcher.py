"""Here a test is the worker: it takes a batch and calls `run`. Only the last tests start workers."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio
import numpy as np
import pytest
from anyio.lowlevel import checkpoint

from service.batcher import Batcher
from service.collate import LENGTHS
from service.errors import DeadlineExceeded, InvalidInput, ModelFailed, NotReady, Overloaded
from service.metrics import DROPS, Metrics, ModelMetrics
from service.sample import Arrays, Sample
from service.ticket import Ticket

pytestmark = pytest.mark.anyio

MODEL = "fake"
LONG = 1000.0


class Clock:
    """Time that moves when told, and the event loop's timers on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, asyncio.Handle]] = []

    def __call__(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, asyncio.get_running_loop())
        self._timers.append((self.now + delay, handle))
        return handle

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self._timers if timer[0] <= self.now]
        self._timers = [timer for timer in self._timers if timer not in due]
        for _, handle in due:
            if not handle.cancelled():
                handle._run()
        await settle()


class Program:
    """Doubles `x`; remembers what it was given; fails or takes time when told."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.calls: list[tuple[Arrays, tuple[str, ...]]] = []
        self.failure: Exception | None = None
        self.seconds = 0.0

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        self.calls.append((inputs, tuple(outputs)))
        self.clock.now += self.seconds
        if self.failure is not None:
            raise self.failure
        return dict.fromkeys(outputs, inputs["x"] * 2)

    @property
    def rows(self) -> list[list[float]]:
        """The first number of each sample, for each batch."""
        return [inputs["x"].reshape(len(inputs["x"]), -1)[:, 0].tolist() for inputs, _ in self.calls]


async def settle() -> None:
    """Let the event loop do what is due: answers arrive, then callbacks of their futures run."""
    for _ in range(3):
        await checkpoint()


class Bench:
    """A batcher with everything around it."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.program = Program(self.clock)
        self.metrics = Metrics()
        self.batcher = Batcher(
            self.program,
            ModelMetrics(self.metrics, MODEL),
            **{"max_batch": 4, "max_queue": 100, "clock": self.clock, **settings},
        )
        asyncio.get_running_loop().call_later = self.clock.call_later  # type: ignore[method-assign, assignment]
        self.queue = self.batcher._queue
        self.batcher.start(0)

    def submit(self, value: float, *, length: int = 1, timeout_seconds: float = LONG, **put: Any) -> Ticket:
        ticket = self.batcher.admit(timeout_seconds)
        sample = Sample(inputs={"x": np.full((length,), value)}, length=length, context=None)
        self.batcher.put(ticket, sample, put.get("outputs", ("y",)), put.get("finish", first_number))
        return ticket

    async def work(self) -> None:
        """Be a free worker for one batch."""
        batch, _ = self.queue.choose()
        assert batch is not None, "nothing to do"
        self.batcher.run(*batch)
        await settle()

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"inference_{name}", {"model": MODEL, **labels})


def first_number(outputs: Arrays) -> float:
    return float(outputs["y"][0])


@pytest.fixture(autouse=True)
async def _real_timers_afterwards() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    yield
    loop.__dict__.pop("call_later", None)


# What runs


async def test_each_sample_of_a_batch_gets_its_own_answer() -> None:
    bench = Bench()
    tickets = [bench.submit(value) for value in (1, 2, 3)]
    await bench.work()
    assert bench.program.rows == [[1, 2, 3]]
    assert [ticket.future.result() for ticket in tickets] == [2, 4, 6]


async def test_the_settings_are_those_of_the_queue() -> None:
    bench = Bench(buckets=(4, 8), short_length=4, max_batch=2, max_wait_seconds=0.5)
    bench.submit(1, length=8)
    assert bench.queue.choose()[0] is not None  # of long samples one is a full batch; it runs from here on
    bench.submit(2, length=8)
    assert bench.queue.choose() == (None, None)
    bench.submit(3, length=4)
    assert bench.queue.choose() == (None, 0.5)
    bench.submit(4, length=4)
    await bench.work()
    assert bench.program.rows == [[3, 4]]


async def test_a_long_batch_that_fails_ends_too() -> None:
    bench = Bench(buckets=(4, 8), short_length=4, max_batch=1)
    tickets = [bench.submit(value, length=8) for value in (1, 2)]
    bench.program.failure = RuntimeError("broken")
    await bench.work()
    bench.program.failure = None
    await bench.work()
    assert tickets[1].future.result() == 4
    with pytest.raises(ModelFailed):
        tickets[0].future.result()


async def test_a_batch_is_padded_to_its_longest_sample_and_told_the_lengths() -> None:
    bench = Bench(buckets=(4, 8))
    bench.submit(1, length=3)
    bench.submit(2, length=2)
    await bench.work()
    ((inputs, _),) = bench.program.calls
    np.testing.assert_array_equal(inputs["x"], [[1, 1, 1], [2, 2, 0]])
    np.testing.assert_array_equal(inputs[LENGTHS], np.array([3, 2], np.int64), strict=True)
    assert bench.metric("batch_padding_ratio_sum") == 1 - 5 / 6


# Work that nobody wants


async def test_an_expired_sample_is_answered_and_never_runs() -> None:
    bench = Bench()
    expired, alive = bench.submit(1, timeout_seconds=2.0), bench.submit(2, timeout_seconds=5.0)
    await bench.clock.advance(3.0)
    await bench.work()
    assert bench.program.rows == [[2]]
    assert alive.future.result() == 4
    with pytest.raises(DeadlineExceeded, match="no answer within 2 s"):
        expired.future.result()


async def test_a_sample_that_expires_while_it_runs_is_answered_once() -> None:
    bench = Bench()
    ticket = bench.submit(1, timeout_seconds=2.0)
    batch, _ = bench.queue.choose()
    assert batch is not None
    await bench.clock.advance(3.0)
    bench.batcher.run(*batch)
    await settle()
    with pytest.raises(DeadlineExceeded):
        ticket.future.result()
    assert bench.metric("queue_depth") == 0


async def test_a_cancelled_sample_never_runs() -> None:
    bench = Bench()
    tickets = [bench.submit(value) for value in (1, 2, 3)]
    tickets[1].future.cancel()
    await settle()
    await bench.work()
    assert bench.program.rows == [[1, 3]]


async def test_where_everybody_left_there_is_no_batch() -> None:
    bench = Bench()
    bench.submit(1).future.cancel()
    await settle()
    assert bench.queue.choose() == (None, None)


async def test_a_client_that_leaves_while_its_batch_runs_harms_no_neighbour() -> None:
    bench = Bench()
    gone, stays = bench.submit(1), bench.submit(2)
    batch, _ = bench.queue.choose()
    assert batch is not None
    gone.future.cancel()
    bench.batcher.run(*batch)
    await settle()
    assert stays.future.result() == 4


# Failures


async def test_one_failed_batch_leaves_the_next_one_alone(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(max_batch=2)
    failed = [bench.submit(1), bench.submit(2)]
    bench.program.failure = RuntimeError("internal text")
    await bench.work()
    bench.program.failure = None
    served = bench.submit(3)
    await bench.work()
    for ticket in failed:
        with pytest.raises(ModelFailed) as caught:
            ticket.future.result()
        assert "internal text" not in str(caught.value)
        assert str(caught.value.__cause__) == "internal text"
    assert served.future.result() == 6
    assert "internal text" in caplog.text


async def test_a_program_that_forgets_an_output_fails_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    tickets = [bench.submit(1), bench.submit(2)]
    monkeypatch.setattr(bench.program, "run", lambda inputs, outputs: {})
    await bench.work()
    for ticket in tickets:
        with pytest.raises(ModelFailed):
            ticket.future.result()


@pytest.mark.parametrize(
    ("fault", "expected"), [(InvalidInput("the picture is empty"), InvalidInput), (KeyError("y"), ModelFailed)]
)
async def test_one_bad_answer_leaves_its_neighbours_alone(fault: Exception, expected: type[Exception]) -> None:
    def fail(outputs: Arrays) -> float:
        raise fault

    bench = Bench()
    first, bad, last = bench.submit(1), bench.submit(2, finish=fail), bench.submit(3)
    await bench.work()
    assert (first.future.result(), last.future.result()) == (2, 6)
    with pytest.raises(expected):
        bad.future.result()


async def test_a_ticket_can_be_failed_before_anything_was_put() -> None:
    bench = Bench()
    ticket = bench.batcher.admit(LONG)
    bench.batcher.fail(ticket, InvalidInput("the body is empty"))
    await settle()
    with pytest.raises(InvalidInput):
        ticket.future.result()
    assert bench.metric("queue_depth") == 0


# The border with the event loop


async def test_a_batch_wakes_the_event_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    tickets = [bench.submit(value) for value in range(4)]
    loop = asyncio.get_running_loop()
    wake_ups: list[object] = []
    call = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args, **kw: wake_ups.append(args) or call(*args, **kw))
    batch, _ = bench.queue.choose()
    assert batch is not None
    bench.batcher.run(*batch)
    assert len(wake_ups) == 1
    await settle()
    assert all(ticket.future.done() for ticket in tickets)


async def test_only_the_outputs_asked_for_are_requested_of_the_program() -> None:
    bench = Bench()
    bench.submit(1, outputs=("y",))
    await bench.work()
    bench.submit(1, outputs=("y",))
    bench.submit(2, outputs=("z", "y"))
    await bench.work()
    assert [outputs for _, outputs in bench.program.calls] == [("y",), ("y", "z")]


async def test_each_answer_sees_only_the_outputs_it_asked_for() -> None:
    bench = Bench()
    seen: list[set[str]] = []
    bench.submit(1, outputs=("y",), finish=lambda outputs: seen.append(set(outputs)))
    bench.submit(2, outputs=("z",), finish=lambda outputs: seen.append(set(outputs)))
    await bench.work()
    assert seen == [{"y"}, {"z"}]


# Admission


async def test_one_request_more_than_the_queue_holds_is_refused() -> None:
    bench = Bench(max_queue=2)
    bench.submit(1)
    bench.submit(2)
    with pytest.raises(Overloaded, match="2 requests are waiting; at most 2 may") as caught:
        bench.batcher.admit(LONG)
    assert caught.value.retry_after_seconds == 1
    assert bench.metric("queue_depth") == 2


async def test_a_request_counts_from_admission_on_not_from_put_on() -> None:
    bench = Bench(max_queue=1)
    bench.batcher.admit(LONG)
    with pytest.raises(Overloaded):
        bench.batcher.admit(LONG)


async def test_a_place_in_the_queue_is_free_again_after_the_answer() -> None:
    bench = Bench(max_queue=1)
    bench.submit(1)
    await bench.work()
    bench.submit(2)
    await bench.work()
    assert bench.program.rows == [[1], [2]]


async def test_the_slower_the_program_the_later_a_refused_client_shall_come_back() -> None:
    bench = Bench(max_queue=10)
    bench.program.seconds = 8.0
    for value in range(40):
        bench.submit(value)
        await bench.work()
    for value in range(10):
        bench.submit(value)
    with pytest.raises(Overloaded) as caught:
        bench.batcher.admit(LONG)
    assert 60 <= caught.value.retry_after_seconds <= 80  # ten samples of 8 s, one worker


# Stopping


async def test_drain_waits_for_what_was_accepted_and_refuses_what_comes() -> None:
    bench = Bench()
    tickets = [bench.submit(1), bench.submit(2)]
    drain = asyncio.ensure_future(bench.batcher.drain())
    await settle()
    assert not drain.done()
    with pytest.raises(NotReady):
        bench.batcher.admit(LONG)
    await bench.work()
    assert [ticket.future.result() for ticket in tickets] == [2, 4]
    await settle()
    assert drain.done()


async def test_drain_waits_for_a_request_that_is_still_being_decoded() -> None:
    bench = Bench()
    ticket = bench.batcher.admit(LONG)
    drain = asyncio.ensure_future(bench.batcher.drain())
    await settle()
    assert not drain.done()
    bench.batcher.put(ticket, Sample(inputs={"x": np.ones(1)}, length=1, context=None), ("y",), first_number)
    await bench.work()
    assert ticket.future.result() == 2
    await drain


async def test_drain_of_an_idle_batcher_returns_at_once_and_again() -> None:
    bench = Bench()
    await bench.batcher.drain()
    await bench.batcher.drain()


async def test_a_closed_batcher_lets_its_workers_go() -> None:
    bench = Bench()
    bench.submit(1)
    bench.batcher.close()
    assert bench.queue.take() is None


# Metrics


async def test_queue_depth_returns_to_zero_however_requests_end(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(max_batch=1)
    bench.submit(1)
    bench.submit(2)
    bench.submit(3, timeout_seconds=1.0)
    bench.submit(4).future.cancel()
    failed = bench.batcher.admit(LONG)
    assert bench.metric("queue_depth") == 5
    bench.batcher.fail(failed, InvalidInput("no picture"))
    await bench.clock.advance(2.0)
    await bench.work()
    bench.program.failure = RuntimeError("broken")
    await bench.work()
    assert bench.metric("queue_depth") == 0
    failed.future.exception()


async def test_drops_are_counted_by_their_reason_and_other_ends_are_none() -> None:
    bench = Bench()
    bench.submit(1)
    late = [bench.submit(2, timeout_seconds=1.0) for _ in range(2)]
    gone = [bench.submit(3) for _ in range(3)]
    failed = bench.batcher.admit(LONG)
    bench.batcher.fail(failed, InvalidInput("no picture"))
    for ticket in gone:
        ticket.future.cancel()
    await bench.clock.advance(2.0)
    await bench.work()
    assert [bench.metric("drops_total", reason=reason) for reason in DROPS] == [len(late), len(gone)]
    for ticket in (failed, *late):
        ticket.future.exception()


async def test_limits_are_metrics_from_the_start() -> None:
    bench = Bench(max_queue=7)
    assert [bench.metric(name) for name in ("queue_limit", "workers", "batches_in_flight")] == [7, 0, 0]
    assert [bench.metric("drops_total", reason=reason) for reason in DROPS] == [0, 0]


async def test_a_bundle_and_the_one_that_replaces_it_share_the_queue_depth() -> None:
    old = Bench()
    new = Batcher(old.program, ModelMetrics(old.metrics, MODEL), max_batch=4, max_queue=100, clock=old.clock)
    new.start(0)
    old.submit(1)
    second = new.admit(LONG)
    assert old.metric("queue_depth") == 2
    await old.work()
    assert old.metric("queue_depth") == 1
    second.future.cancel()
    await settle()
    assert old.metric("queue_depth") == 0


async def test_stage_times_reach_the_ticket_and_the_metrics() -> None:
    bench = Bench()
    bench.program.seconds = 0.25
    tickets = [bench.submit(1), bench.submit(2)]
    await bench.clock.advance(0.5)
    await bench.work()
    for ticket in tickets:
        assert ticket.times == {"queue": 0.5, "run": 0.25, "postprocess": 0.0}
    counts = {stage: bench.metric("stage_duration_seconds_count", stage=stage) for stage in ("queue", "run")}
    assert counts == {"queue": 2, "run": 1}
    assert bench.metric("batch_size_sum") == 2
    assert bench.metric("batch_padding_ratio_sum") == 0


# With workers


class MeetingProgram:
    """Each run waits until as many others run beside it."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number)
        self.sizes: list[int] = []

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        self.sizes.append(len(inputs["x"]))
        self.barrier.wait(timeout=30)
        return {"y": inputs["x"]}


async def test_free_workers_share_what_waits_and_run_beside_each_other() -> None:
    program = MeetingProgram(2)
    batcher = Batcher(program, ModelMetrics(Metrics(), MODEL), max_batch=8, max_queue=100)
    batcher.start(2)
    while batcher._queue._num_idle < 2:
        await checkpoint()
    tickets = [batcher.admit(LONG) for _ in range(4)]
    with batcher._queue._lock:  # the workers see all four at once
        for value, ticket in enumerate(tickets):
            sample = Sample(inputs={"x": np.full((1,), value)}, length=1, context=None)
            batcher.put(ticket, sample, ("y",), first_number)
    with anyio.fail_after(60):
        assert [await ticket.future for ticket in tickets] == [0, 1, 2, 3]
    assert program.sizes == [2, 2]
    batcher.close()


class CountedProgram:
    """Two runs meet, look at the number of batches in flight, and part."""

    def __init__(self, metrics: Metrics) -> None:
        self.barrier = threading.Barrier(2)
        self.metrics = metrics
        self.seen: list[float | None] = []

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        self.barrier.wait(timeout=30)
        self.seen.append(self.metrics.registry.get_sample_value("inference_batches_in_flight", {"model": MODEL}))
        self.barrier.wait(timeout=30)
        return {"y": inputs["x"]}


async def test_batches_are_in_flight_from_their_start_to_their_end() -> None:
    metrics = Metrics()
    program = CountedProgram(metrics)
    batcher = Batcher(program, ModelMetrics(metrics, MODEL), max_batch=1, max_queue=100)
    batcher.start(2)
    tickets = [batcher.admit(LONG) for _ in range(2)]
    for ticket in tickets:
        batcher.put(ticket, Sample(inputs={"x": np.zeros(1)}, length=1, context=None), ("y",), first_number)
    with anyio.fail_after(60):
        assert [await ticket.future for ticket in tickets] == [0, 0]
    batcher.close()
    assert program.seen == [2, 2]
    assert metrics.registry.get_sample_value("inference_batches_in_flight", {"model": MODEL}) == 0
    assert metrics.registry.get_sample_value("inference_workers", {"model": MODEL}) == 2


async def test_workers_answer_everybody_and_end_when_closed() -> None:
    clock = Clock()
    program = Program(clock)
    batcher = Batcher(program, ModelMetrics(Metrics(), MODEL), max_batch=3, max_queue=1000)
    batcher.start(3)
    tickets = [batcher.admit(LONG) for _ in range(200)]
    for value, ticket in enumerate(tickets):
        sample = Sample(inputs={"x": np.full((1,), value)}, length=1, context=None)
        batcher.put(ticket, sample, ("y",), first_number)
    with anyio.fail_after(60):
        assert [await ticket.future for ticket in tickets] == [2 * value for value in range(200)]
    assert max(map(len, program.rows)) <= 3
    batcher.close()
    assert not any(worker.is_alive() for worker in batcher._workers)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the operating system does not pin threads")
async def test_workers_keep_to_the_cores_that_they_are_given() -> None:
    core = min(os.sched_getaffinity(0))
    bench = Bench()
    bench.batcher.start(2, [core, core])
    with anyio.fail_after(10):
        while {frozenset(os.sched_getaffinity(worker.native_id or 0)) for worker in bench.batcher._workers} != {
            frozenset({core})
        }:
            await checkpoint()
    bench.batcher.close()
