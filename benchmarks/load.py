"""Load on a server: closed loop, open loop, or a list of requests once.

Closed loop: each connection sends its next request when the last answer came. Open loop: requests are due at Poisson
times whatever the server does, and latency counts from when a request was due, so that a slow server cannot slow the
load down (no coordinated omission).
"""

import itertools
import random
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.client import Address, Answer, Connection

SEED = 7
GIVE_UP_SECONDS = 60.0  # without a single answer
MAX_OPEN_CONNECTIONS = 512


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What is measured of a load, and what comes before that.

    Attributes:
        warm_seconds: of the same load, not counted.
        seconds: counted.
        at_edges: called when the counted part begins and when it ends.
    """

    warm_seconds: float
    seconds: float
    at_edges: Callable[[], None]


@dataclass(kw_only=True)
class Outcome:
    """What came back in the counted part.

    Attributes:
        latencies: seconds, of answers with status 200.
        num_errors: other answers, broken connections, and requests that found no connection.
        seconds: how long the counted part really took.
    """

    latencies: list[float] = field(default_factory=list)
    num_errors: int = 0
    seconds: float = 0.0


class _Connections:
    """Connections by file descriptor, and those of them that have something to read."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._epoll = select.epoll()
        self._all: dict[int, Connection] = {}

    def __len__(self) -> int:
        return len(self._all)

    def open(self) -> Connection:
        connection = Connection(self._address)
        self._all[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, select.EPOLLIN)
        return connection

    def drop(self, connection: Connection) -> None:
        del self._all[connection.socket.fileno()]
        connection.close()

    def wait(self, seconds: float) -> list[Connection]:
        # epoll counts in milliseconds, select on it in microseconds: an open loop must not be late by itself.
        if not select.select([self._epoll], [], [], seconds)[0]:
            return []
        return [self._all[descriptor] for descriptor, _ in self._epoll.poll(0)]

    def wait_for_any(self) -> list[Connection]:
        ready = self._epoll.poll(GIVE_UP_SECONDS)
        if not ready:
            raise TimeoutError(f"no answer came for {GIVE_UP_SECONDS:g} s")
        return [self._all[descriptor] for descriptor, _ in ready]

    def close(self) -> None:
        for connection in self._all.values():
            connection.close()
        self._epoll.close()


def closed_loop(address: Address, requests: Sequence[bytes], *, num_connections: int, stretch: Stretch) -> Outcome:
    """Keep `num_connections` requests in flight.

    Raises: TimeoutError if the server stops answering; OSError if it cannot be reached.
    """
    supply = itertools.cycle(requests)
    connections = _Connections(address)
    outcome = Outcome()
    for _ in range(num_connections):
        connections.open().send(next(supply), time.perf_counter())
    start = time.perf_counter() + stretch.warm_seconds
    end = start + stretch.seconds
    began: float | None = None
    now = 0.0
    while now < end:
        for connection in connections.wait_for_any():
            status = _receive_status(connection)
            if status == 0:
                continue
            now = time.perf_counter()
            if began is not None:
                _count(outcome, status, now - connection.sent_at)
            elif now >= start:
                began = now
                stretch.at_edges()
            if status < 0:
                connections.drop(connection)
                connection = connections.open()  # noqa: PLW2901 - takes the place of the one that broke
            connection.send(next(supply), now)
    stretch.at_edges()
    outcome.seconds = now - (began or start)
    connections.close()
    return outcome


def open_loop(address: Address, requests: Sequence[bytes], *, rate: float, stretch: Stretch) -> Outcome:
    """Send requests at Poisson times, `rate` a second on average; the times are the same at every call.

    Raises: OSError if the server cannot be reached.
    """
    supply = itertools.cycle(requests)
    rng = random.Random(SEED)
    connections = _Connections(address)
    idle: list[Connection] = []
    outcome = Outcome()
    start = time.perf_counter() + stretch.warm_seconds
    end = start + stretch.seconds
    due = time.perf_counter()
    began: float | None = None
    while (now := time.perf_counter()) < end:
        if began is None and now >= start:
            began = now
            stretch.at_edges()
        while due <= now:
            if idle or len(connections) < MAX_OPEN_CONNECTIONS:
                (idle.pop() if idle else connections.open()).send(next(supply), due)
            else:
                outcome.num_errors += 1
            due += rng.expovariate(rate)
        for connection in connections.wait(max(0.0, min(due, end) - time.perf_counter())):
            status = _receive_status(connection)
            if status == 0:
                continue
            if connection.sent_at >= start:
                _count(outcome, status, time.perf_counter() - connection.sent_at)
            if status > 0:
                idle.append(connection)
            else:
                connections.drop(connection)
    stretch.at_edges()
    outcome.seconds = time.perf_counter() - (began or start)
    connections.close()
    return outcome


def exchange(
    address: Address, requests: Sequence[bytes], *, num_connections: int, timeout_seconds: float
) -> list[Answer | None]:
    """Send every request once and collect the answers.

    Args:
        address: of the server.
        requests: to be sent.
        num_connections: how many are in flight at once.
        timeout_seconds: for all of them together.
    Returns: answers in the order of the requests; None where none came.
    """
    connections = _Connections(address)
    answers: list[Answer | None] = [None] * len(requests)
    todo = iter(range(len(requests)))
    in_flight: dict[Connection, int] = {}
    opened = [connections.open() for _ in range(min(num_connections, len(requests)))]
    end = time.perf_counter() + timeout_seconds
    for connection in opened:
        in_flight[connection] = next(todo)
        connection.send(requests[in_flight[connection]], time.perf_counter())
    while in_flight and (now := time.perf_counter()) < end:
        for connection in connections.wait(end - now):
            try:
                answer = connection.receive()
            except OSError:
                in_flight.pop(connection)
                connections.drop(connection)
                continue
            if answer is None:
                continue
            answers[in_flight.pop(connection)] = answer
            if (index := next(todo, None)) is not None:
                in_flight[connection] = index
                connection.send(requests[index], now)
    connections.close()
    return answers


def _receive_status(connection: Connection) -> int:
    """Status of the answer that came; 0 while it is incomplete, -1 if the connection broke."""
    try:
        answer = connection.receive()
    except OSError:
        return -1
    return answer.status if answer else 0


def _count(outcome: Outcome, status: int, seconds: float) -> None:
    if status == 200:
        outcome.latencies.append(seconds)
    else:
        outcome.num_errors += 1
