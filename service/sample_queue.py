"""The queue of one endpoint: the samples that wait, and which of them a free worker takes next.

One rule: a free worker takes what is waiting in the oldest sample's bucket, up to `max_batch`, leaving a share for
other free workers; only if `max_wait_seconds` > 0 it waits for more, never longer than that since the oldest sample
arrived, and leaves no share. Under load the device is the clock and nobody waits for a window. A batch of long samples
has fewer of them, and one worker never runs long samples, so that short ones need not wait for the end of one.

Deliberately absent: an end of the queue. How many requests are open at a time is bounded before their samples exist.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from service.collate import bucket_of, scale_max_batch
from service.sample import Arrays, Sample
from service.ticket import Ticket

Clock = Callable[[], float]  # seconds, monotonic


@dataclass(slots=True, eq=False)
class Waiting:
    """A sample in the queue.

    Attributes:
        ticket: of its request.
        sample: what to run.
        outputs: which of the program's outputs it needs.
        finish: turns its outputs, without batch dimension, into the answer.
        since: when it was put.
    """

    ticket: Ticket
    sample: Sample
    outputs: tuple[str, ...]
    finish: Callable[[Arrays], Any]
    since: float


Batch = tuple[list[Waiting], int]  # samples of one bucket, and the bucket


class SampleQueue:
    """The samples that wait and the workers that wait for them; any thread may call.

    Args:
        max_batch: most samples in a batch.
        max_wait_seconds: how long a free worker waits for a fuller batch.
        buckets: longest lengths that are batched together, ascending; empty where all samples have one shape.
        short_length: samples in buckets above it are long; None where there are none.
        clock: of the tickets' deadlines.

    Attributes:
        num_workers: how many threads take from it.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_wait_seconds: float,
        buckets: Sequence[int],
        short_length: int | None,
        clock: Clock,
    ) -> None:
        self.num_workers = 0
        self._max_batch, self._max_wait, self._clock = max_batch, max_wait_seconds, clock
        self._buckets = tuple(buckets)
        self._short_length = math.inf if short_length is None else short_length
        self._lock = threading.RLock()
        self._sleepers: list[threading.Condition] = []  # one for each sleeping worker, the latest last
        self._waiting: dict[int, deque[Waiting]] = {}
        self._num_idle = 0
        self._num_long = 0  # batches of long samples that run
        self._is_closed = False

    def put(self, ticket: Ticket, sample: Sample, outputs: tuple[str, ...], finish: Callable[[Arrays], Any]) -> None:
        """Add a sample; arguments as the attributes of `Waiting`.

        Raises: ValueError if the sample is longer than every bucket.
        """
        bucket = bucket_of(sample.length, self._buckets)
        with self._lock:
            waiting = Waiting(ticket, sample, outputs, finish, self._clock())
            self._waiting.setdefault(bucket, deque()).append(waiting)
            if self._sleepers:
                # The latest one: waking workers in turn would move a lone stream of requests from core to core.
                self._sleepers.pop().notify()

    def take(self) -> Batch | None:
        """Wait for the next batch; None once the queue is closed."""
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

    def choose(self) -> tuple[Batch | None, float | None]:
        """Apply the rule above to what waits.

        Returns: a batch, or None and the seconds after which asking again is worth it (None: when something is put).
        """
        now = self._clock()
        while (oldest := self._find_oldest(now)) is not None:
            queue = self._waiting[oldest]
            max_batch = scale_max_batch(self._max_batch, oldest, self._buckets)
            remaining = queue[0].since + self._max_wait - now
            if self._max_wait and len(queue) < max_batch and remaining > 0:
                return None, remaining
            # Who asked for a window wants full batches; and the rest that a share leaves would wait for one again.
            num_takers = 1 if self._max_wait else max(1, self._num_idle)
            share = min(max_batch, math.ceil(len(queue) / num_takers))
            batch = _pop_wanted(queue, share, now)
            if batch:  # tickets die without the lock, so also between being found and being popped
                self._num_long += self._is_long(oldest)
                return (batch, oldest), None
        return None, None

    def end(self, bucket: int) -> None:
        """Tell that a batch of this bucket, one that was taken, has run."""
        with self._lock:
            self._num_long -= self._is_long(bucket)

    def close(self) -> None:
        """Let every worker go that waits for a batch or comes for one."""
        with self._lock:
            self._is_closed = True
            for sleeper in self._sleepers:
                sleeper.notify()

    def _find_oldest(self, now: float) -> int | None:
        """Find the bucket whose turn it is, and drop what nobody wants from the heads of all."""
        oldest: int | None = None
        takes_long = self._num_long < max(1, self.num_workers - 1)
        for bucket, queue in self._waiting.items():
            while queue and not queue[0].ticket.is_wanted(now):
                queue.popleft()
            if (
                queue
                and (takes_long or not self._is_long(bucket))
                and (oldest is None or queue[0].since < self._waiting[oldest][0].since)
            ):
                oldest = bucket
        return oldest

    def _is_long(self, bucket: int) -> bool:
        return bucket > self._short_length

    def _sleep(self, seconds: float | None) -> None:
        """Wait, with the lock held, until something is put or the time is over (None: for as long as it takes)."""
        sleeper = threading.Condition(self._lock)
        self._sleepers.append(sleeper)
        if not sleeper.wait(seconds):
            with suppress(ValueError):  # whoever notifies removes it
                self._sleepers.remove(sleeper)


def _pop_wanted(queue: deque[Waiting], limit: int, now: float) -> list[Waiting]:
    """Take the oldest samples that somebody wants; drops the others that stand before them."""
    batch: list[Waiting] = []
    while queue and len(batch) < limit:
        waiting = queue.popleft()
        if waiting.ticket.is_wanted(now):
            batch.append(waiting)
    return batch
