"""What our service does under abuse: bad pictures among good ones, far more requests at once than it takes."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.client import Answer
from benchmarks.contestants import Server, run_ours
from benchmarks.inputs import cut_jpegs
from benchmarks.load import exchange

NUM_GOOD, NUM_BAD, NUM_IN_FLIGHT = 150, 5, 32
NUM_AT_ONCE = 600
TIMEOUT_SECONDS = 60.0  # no request of these takes longer, or it hangs


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Answers to a crowd of requests.

    Attributes:
        statuses: how many answers had each status; 0 stands for none.
        num_without_retry: answers 503 that do not say when to try again.
        seconds: from the first request to the last answer.
    """

    statuses: dict[int, int]
    num_without_retry: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What came of it.

    Attributes:
        good, bad: answers to good pictures and to bad ones among them.
        crowd: answers to all requests at once.
        after: answers to good pictures sent one after the other when the crowd had left.
    """

    good: Tally
    bad: Tally
    crowd: Tally
    after: Tally


def measure_robustness(bundle: Path, scratch: Path) -> Robustness:
    """Send bad pictures among good ones, then a crowd, then good pictures again.

    Args:
        bundle: its folder.
        scratch: folder for the log.
    """
    pictures = cut_jpegs()
    with run_ours(bundle, scratch, pictures[0]) as server:
        good, bad = _mix(server, pictures)
        crowd = _send(server, [pictures[i % len(pictures)] for i in range(NUM_AT_ONCE)], num_in_flight=NUM_AT_ONCE)
        after = _send(server, pictures, num_in_flight=1)
    return Robustness(good=good, bad=bad, crowd=tally(*crowd), after=tally(*after))


def tally(answers: Sequence[Answer | None], seconds: float) -> Tally:
    """Count answers by status."""
    return Tally(
        statuses=dict(sorted(Counter(answer.status if answer else 0 for answer in answers).items())),
        num_without_retry=sum(
            1 for answer in answers if answer and answer.status == 503 and b"\r\nretry-after:" not in answer.head
        ),
        seconds=seconds,
    )


def render_robustness(found: Robustness) -> str:
    """Render as Markdown."""
    rows = "\n".join(
        f"| {what} | {', '.join(f'{count} x {status}' for status, count in one.statuses.items())} | "
        f"{one.num_without_retry} | {one.seconds:.2f} |"
        for what, one in (
            (f"{NUM_GOOD} good pictures, {NUM_IN_FLIGHT} in flight", found.good),
            (f"{NUM_BAD} truncated JPEGs among them", found.bad),
            (f"{NUM_AT_ONCE} requests at once", found.crowd),
            ("good pictures after that, one by one", found.after),
        )
    )
    return f"""| requests | answers x status | 503 without Retry-After | seconds until the last answer |
|---|---|---|---|
{rows}

Status 0 stands for no answer within {TIMEOUT_SECONDS:g} s or a broken connection."""


def _mix(server: Server, pictures: Sequence[bytes]) -> tuple[Tally, Tally]:
    every = (NUM_GOOD + NUM_BAD) // NUM_BAD
    is_bad = [index % every == every // 2 for index in range(NUM_GOOD + NUM_BAD)]
    files = [pictures[index % len(pictures)] for index in range(len(is_bad))]
    files = [file[: len(file) // 2] if bad else file for file, bad in zip(files, is_bad, strict=True)]
    answers, seconds = _send(server, files, num_in_flight=NUM_IN_FLIGHT)
    good = [answer for answer, bad in zip(answers, is_bad, strict=True) if not bad]
    bad = [answer for answer, bad in zip(answers, is_bad, strict=True) if bad]
    return tally(good, seconds), tally(bad, seconds)


def _send(server: Server, files: Sequence[bytes], *, num_in_flight: int) -> tuple[list[Answer | None], float]:
    requests = [server.build_request(file) for file in files]
    start = time.perf_counter()
    answers = exchange(server.address, requests, num_connections=num_in_flight, timeout_seconds=TIMEOUT_SECONDS)
    return answers, time.perf_counter() - start
