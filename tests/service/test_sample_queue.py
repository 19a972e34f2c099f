"""Here a test is the free worker: it calls `choose`. Only the last two tests have threads."""

import threading
from typing import Any, cast

import numpy as np
import pytest

from service.sample import Sample
from service.sample_queue import SampleQueue
from service.ticket import Ticket

LONG = 1000.0


class Bench:
    """A queue and a clock that moves when told."""

    def __init__(self, **settings: Any) -> None:
        self.now = 0.0
        defaults = {"max_batch": 4, "max_wait_seconds": 0.0, "buckets": (), "short_length": None}
        self.queue = SampleQueue(**{**defaults, **settings}, clock=lambda: self.now)

    def put(self, *values: float, length: int = 1, seconds: float = LONG) -> list[Ticket]:
        """Samples that hold these numbers."""
        tickets = []
        for value in values:
            ticket = Ticket(future=cast("Any", None), deadline=self.now + seconds)  # the queue looks at no future
            sample = Sample(inputs={"x": np.full((length,), value)}, length=length, context=None)
            self.queue.put(ticket, sample, ("y",), lambda outputs: outputs)
            tickets.append(ticket)
        return tickets

    def take(self) -> list[float]:
        """The numbers of the next batch, which runs at once."""
        batch, _ = self.queue.choose()
        assert batch is not None, "nothing to take"
        self.queue.end(batch[1])
        return values_of(batch)


def values_of(batch: Any) -> list[float]:
    return [float(waiting.sample.inputs["x"][0]) for waiting in batch[0]]


# What a free worker takes


def test_a_free_worker_takes_what_waits_without_waiting_for_more() -> None:
    bench = Bench()
    bench.put(1, 2, 3)
    assert bench.take() == [1, 2, 3]


def test_a_free_worker_with_nothing_to_do_waits_until_something_is_put() -> None:
    assert Bench().queue.choose() == (None, None)


def test_a_batch_holds_at_most_max_batch_samples_oldest_first() -> None:
    bench = Bench(max_batch=4)
    bench.put(*range(6))
    assert [bench.take(), bench.take()] == [[0, 1, 2, 3], [4, 5]]


def test_a_share_is_left_for_other_free_workers() -> None:
    bench = Bench(max_batch=4)
    bench.put(*range(5))
    bench.queue._num_idle = 2
    first = bench.take()
    bench.queue._num_idle = 1
    assert [first, bench.take()] == [[0, 1, 2], [3, 4]]


def test_with_a_window_a_worker_waits_for_the_rest_of_it_only() -> None:
    bench = Bench(max_wait_seconds=0.5)
    bench.put(1)
    assert bench.queue.choose() == (None, 0.5)
    bench.now += 0.375
    bench.put(2)
    assert bench.queue.choose() == (None, 0.125)
    bench.now += 0.125
    assert bench.take() == [1, 2]


def test_a_full_batch_does_not_wait_for_the_window() -> None:
    bench = Bench(max_batch=2, max_wait_seconds=0.5)
    bench.put(1, 2)
    assert bench.take() == [1, 2]


def test_with_a_window_a_full_batch_is_not_shared_as_its_rest_would_wait_again() -> None:
    bench = Bench(max_batch=2, max_wait_seconds=0.5)
    bench.queue._num_idle = 2
    bench.put(1, 2)
    assert bench.take() == [1, 2]


def test_a_window_that_was_missed_does_not_start_anew() -> None:
    bench = Bench(max_wait_seconds=0.5)
    bench.put(1)
    bench.now += 2.0  # all workers were busy
    bench.put(2)
    assert bench.take() == [1, 2]


# Buckets


def test_the_bucket_of_the_oldest_sample_comes_first() -> None:
    bench = Bench(buckets=(4, 8))
    for value, length in ((1, 7), (2, 3), (3, 8), (4, 4)):
        bench.put(value, length=length)
        bench.now += 0.001
    assert [bench.take(), bench.take()] == [[1, 3], [2, 4]]


def test_a_sample_beyond_the_longest_bucket_is_not_queued() -> None:
    bench = Bench(buckets=(4,))
    with pytest.raises(ValueError, match="longest bucket"):
        bench.put(1, length=5)
    assert bench.queue.choose() == (None, None)


def test_a_batch_of_long_samples_has_fewer_of_them() -> None:
    bench = Bench(buckets=(4, 8, 100), max_batch=4)
    bench.put(*range(5), length=8)
    bench.put(5, 6, length=100)
    assert [bench.take() for _ in range(5)] == [[0, 1], [2, 3], [4], [5], [6]]


@pytest.mark.parametrize(("num_workers", "num_at_once"), [(1, 1), (2, 1), (3, 2)])
def test_long_samples_leave_one_worker_to_the_short_ones(num_workers: int, num_at_once: int) -> None:
    bench = Bench(buckets=(4, 8), short_length=4, max_batch=1)
    bench.queue.num_workers = num_workers
    bench.put(1, 2, 3, length=8)
    bench.now += 0.001
    running = [bench.queue.choose()[0] for _ in range(num_at_once)]  # workers run long samples from here on
    assert bench.queue.choose() == (None, None)
    bench.put(4, length=2)
    assert bench.take() == [4]
    bench.queue.end(8)
    assert [values_of(batch) for batch in running] == [[1], [2]][:num_at_once]
    assert bench.take() == [num_at_once + 1]


# Samples that nobody wants


def test_samples_that_nobody_wants_are_passed_over_wherever_they_stand() -> None:
    bench = Bench()
    bench.put(1, seconds=2.0)
    bench.put(2)
    (gone,) = bench.put(3)
    bench.put(4, seconds=2.0)
    bench.put(5)
    gone.is_dead = True
    bench.now += 2.0
    assert bench.take() == [2, 5]


def test_where_everybody_left_there_is_no_batch() -> None:
    bench = Bench(buckets=(4, 8))
    for ticket in (*bench.put(1, length=4), *bench.put(2, length=8)):
        ticket.is_dead = True
    assert bench.queue.choose() == (None, None)


class Leaving(Ticket):
    """Its client is there when the queue first looks, and gone when it looks again."""

    def is_wanted(self, now: float) -> bool:
        was_wanted = super().is_wanted(now)
        self.is_dead = True
        return was_wanted


@pytest.mark.parametrize("others", [[], [4.0]])
def test_a_client_who_leaves_while_the_queue_looks_makes_no_empty_batch(others: list[float]) -> None:
    bench = Bench(buckets=(4, 8), short_length=4)
    sample = Sample(inputs={"x": np.zeros(8)}, length=8, context=None)
    bench.queue.put(Leaving(future=cast("Any", None), deadline=LONG), sample, ("y",), lambda outputs: outputs)
    bench.put(*others)
    batch, seconds = bench.queue.choose()
    assert (batch and values_of(batch), seconds) == (others or None, None)
    assert bench.queue._num_long == 0


# With threads


def test_a_closed_queue_lets_workers_go_although_samples_wait() -> None:
    bench = Bench()
    bench.put(1)
    bench.queue.close()
    assert bench.queue.take() is None


def test_sleeping_workers_wake_up_when_something_is_put_and_when_the_queue_closes() -> None:
    bench = Bench()
    taken: list[float] = []
    is_everything_taken = threading.Event()

    def work() -> None:
        while (batch := bench.queue.take()) is not None:
            taken.extend(values_of(batch))
            if len(taken) == 100:
                is_everything_taken.set()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    for value in range(100):
        bench.put(value)
    assert is_everything_taken.wait(timeout=10)
    bench.queue.close()
    for worker in workers:
        worker.join(timeout=10)
    assert not any(worker.is_alive() for worker in workers)
    assert sorted(taken) == list(range(100))
