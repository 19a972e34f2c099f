"""Our service, a plain FastAPI route and the bare ONNX Runtime loop on the same bundle, interleaved.

Machines are noisy, so all contestants take turns within each round, in an order that rotates, and are compared by the
median over rounds of the ratio within a round.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.bare import Job
from benchmarks.contestants import BareLoop, Server, read_max_batch, run_bare, run_ours, run_plain
from benchmarks.figures import percentile
from benchmarks.inputs import cut_jpegs
from benchmarks.load import Outcome, Stretch, closed_loop, open_loop
from benchmarks.machine import CoreSeconds, read_core_seconds, read_process_seconds
from service.settings import count_cores

CONNECTIONS = (1, 4, 16, 64)
OPEN_SHARES = (0.4, 0.7)  # of the bare loop's rate
BARE = "bare"
BARE_BATCHES = (1, 8)  # beside the batch cap that our service found: the yardstick does not hang on it
WITHOUT_DECODING = "no decode"

Drive = Callable[[Server, Stretch], Outcome]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: of all contestants under all loads.
        seconds: counted of one contestant under one load.
        warm_seconds: of the same, before that, not counted.
    """

    rounds: int
    seconds: float
    warm_seconds: float


@dataclass(frozen=True, kw_only=True)
class Window:
    """One contestant under one load in one round.

    Attributes:
        load: `c=64`, `open 150/s`; of a bare loop the load that it stands beside, or `no decode`.
        contestant: `ours`, `plain`, or what kind of bare loop.
        round: from 0.
        rate: answers (of a bare loop pictures) a second.
        p50_seconds, p99_seconds: latency; of a bare loop that of one call.
        cpu_seconds: of the server's process for one request.
        client_cpu_seconds: of the load generator for one request.
        num_errors: requests without a good answer.
        other_cores, stolen_cores: kept busy by other processes and by other machines meanwhile.
    """

    load: str
    contestant: str
    round: int
    rate: float
    p50_seconds: float
    p99_seconds: float
    cpu_seconds: float
    client_cpu_seconds: float
    num_errors: int
    other_cores: float
    stolen_cores: float


class Edge(NamedTuple):
    """Readings at one end of a window: clocks of wall, server, client, machine."""

    wall: float
    server: float
    client: float
    machine: CoreSeconds


class Bench:
    """All contestants, running.

    Args:
        servers: ours and the plain one.
        bare: the yardstick.
        pictures: JPEG files to send.
        max_batch: that our service found; the bare loop is also measured at it.
        plan: how long to measure.

    Attributes:
        windows: all that was measured.
    """

    def __init__(
        self, servers: Sequence[Server], bare: BareLoop, pictures: Sequence[bytes], *, max_batch: int, plan: Plan
    ) -> None:
        self._servers, self._bare, self._plan = servers, bare, plan
        self._requests = {server.name: [server.build_request(picture) for picture in pictures] for server in servers}
        self.max_batch = max_batch
        self.windows: list[Window] = []

    def measure_round(self, index: int, rates: Sequence[float]) -> None:
        """Measure all contestants under all loads once.

        Args:
            index: of the round.
            rates: of the open loops, requests a second.
        """
        for number in CONNECTIONS:
            self._take_turns(f"c={number}", index, self._bare_jobs(number), self._closed(number))
        for rate in rates:
            self._take_turns(f"open {rate:.0f}/s", index, {}, self._open(rate))
        self._take_turns(WITHOUT_DECODING, index, self._jobs(count_cores(), self._batches(), decodes=False), None)

    def find_rate(self) -> float:
        """Measure the bare loop's rate, decoding included, to choose the open loops' rates by."""
        return max(self._bare.measure(job).rate for job in self._bare_jobs(max(CONNECTIONS)).values())

    def _take_turns(self, load: str, index: int, jobs: Mapping[str, Job], drive: Drive | None) -> None:
        turns: list[Callable[[], Window]] = [partial(self._measure_bare, load, index, *item) for item in jobs.items()]
        if drive is not None:
            turns += [partial(self._measure_server, load, index, server, drive) for server in self._servers]
        shift = index % len(turns)
        self.windows += [turn() for turn in turns[shift:] + turns[:shift]]

    def _closed(self, number: int) -> Drive:
        def drive(server: Server, stretch: Stretch) -> Outcome:
            requests = self._requests[server.name]
            return closed_loop(server.address, requests, num_connections=number, stretch=stretch)

        return drive

    def _open(self, rate: float) -> Drive:
        def drive(server: Server, stretch: Stretch) -> Outcome:
            return open_loop(server.address, self._requests[server.name], rate=rate, stretch=stretch)

        return drive

    def _batches(self) -> list[int]:
        return sorted({*BARE_BATCHES, self.max_batch})

    def _bare_jobs(self, num_connections: int) -> dict[str, Job]:
        """What may stand beside a closed loop: one request at a time uses one core and no batch."""
        if num_connections == 1:
            return self._jobs(1, [1], decodes=True)
        return self._jobs(count_cores(), self._batches(), decodes=True)

    def _jobs(self, num_threads: int, batches: Sequence[int], *, decodes: bool) -> dict[str, Job]:
        warm, seconds = self._plan.warm_seconds, self._plan.seconds
        return {
            f"{BARE}, {num_threads} threads, batch {batch}": Job(
                num_threads=num_threads, batch=batch, decodes=decodes, warm_seconds=warm, seconds=seconds
            )
            for batch in batches
        }

    def _measure_bare(self, load: str, index: int, contestant: str, job: Job) -> Window:
        before = read_edge(None)
        finding = self._bare.measure(job)
        after = read_edge(None)
        wall = after.wall - before.wall
        busy = after.machine.busy - before.machine.busy
        return Window(
            load=load,
            contestant=contestant,
            round=index,
            rate=finding.rate,
            p50_seconds=percentile(finding.latencies, 0.5),
            p99_seconds=percentile(finding.latencies, 0.99),
            cpu_seconds=finding.cpu_seconds,
            client_cpu_seconds=0.0,
            num_errors=0,
            other_cores=max(0.0, busy - finding.process_seconds) / wall,
            stolen_cores=(after.machine.stolen - before.machine.stolen) / wall,
        )

    def _measure_server(self, load: str, index: int, server: Server, drive: Drive) -> Window:
        edges: list[Edge] = []
        stretch = Stretch(
            warm_seconds=self._plan.warm_seconds,
            seconds=self._plan.seconds,
            at_edges=lambda: edges.append(read_edge(server.process_id)),
        )
        outcome = drive(server, stretch)
        before, after = edges
        wall = after.wall - before.wall
        of_server, of_client = after.server - before.server, after.client - before.client
        num_answers = len(outcome.latencies) + outcome.num_errors
        return Window(
            load=load,
            contestant=server.name,
            round=index,
            rate=len(outcome.latencies) / outcome.seconds,
            p50_seconds=percentile(outcome.latencies, 0.5),
            p99_seconds=percentile(outcome.latencies, 0.99),
            cpu_seconds=of_server / num_answers,
            client_cpu_seconds=of_client / num_answers,
            num_errors=outcome.num_errors,
            other_cores=max(0.0, after.machine.busy - before.machine.busy - of_server - of_client) / wall,
            stolen_cores=(after.machine.stolen - before.machine.stolen) / wall,
        )


def measure_serving(bundle: Path, scratch: Path, plan: Plan) -> Bench:
    """Start all contestants on a bundle, measure all rounds, stop them.

    Args:
        bundle: its folder.
        scratch: folder for logs.
        plan: how long.
    """
    pictures = cut_jpegs()
    with ExitStack() as stack:
        ours = stack.enter_context(run_ours(bundle, scratch, pictures[0]))
        theirs = stack.enter_context(run_plain(bundle, scratch, pictures[0]))
        bare = stack.enter_context(run_bare(bundle))
        bench = Bench([ours, theirs], bare, pictures, max_batch=read_max_batch(ours), plan=plan)
        rate = bench.find_rate()
        for index in range(plan.rounds):
            print(f"{bundle.name}: round {index + 1} of {plan.rounds}", flush=True)
            bench.measure_round(index, [share * rate for share in OPEN_SHARES])
    return bench


def read_edge(process_id: int | None) -> Edge:
    """Read all clocks; the server's is 0 where there is none."""
    server = read_process_seconds(process_id) if process_id is not None else 0.0
    return Edge(time.perf_counter(), server, time.process_time(), read_core_seconds())
