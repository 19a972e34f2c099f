"""Short recordings alone, and beside a connection that sends a long one again and again: what they wait for it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

from benchmarks.figures import percentile
from benchmarks.load import Stretch, closed_loop
from benchmarks.speech_service import NoAnswer, SpeechService

NUM_CONNECTIONS = 2
WARM_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Window:
    """Short recordings for some seconds.

    Attributes:
        round: from 0.
        has_long: whether a long recording was under way all the time.
        num_answers, num_errors: of short requests.
        p50_seconds, p95_seconds: latency of short requests.
        long_seconds: of each long request that ran at some time of the window.
    """

    round: int
    has_long: bool
    num_answers: int
    num_errors: int
    p50_seconds: float
    p95_seconds: float
    long_seconds: list[float]


def measure_mixed(
    service: SpeechService, shorts: Sequence[bytes], long: bytes, *, num_rounds: int, seconds: float
) -> list[Window]:
    """Measure both loads in turns.

    Args:
        service: that answers.
        shorts: recordings of one utterance.
        long: a long recording.
        num_rounds: of both.
        seconds: of each window.
    Raises: NoAnswer if a long request fails, or no short one is answered in a window.
    """
    requests = [service.build_request(audio) for audio in shorts]
    windows = []
    for index in range(num_rounds):
        windows.append(_measure_window(service, requests, index, seconds, long_seconds=None))
        with repeat(lambda: service.transcribe([long])[0].seconds) as long_seconds:
            window = _measure_window(service, requests, index, seconds, long_seconds=long_seconds)
        windows.append(window)
    return windows


@contextmanager
def repeat(send: Callable[[], float]) -> Iterator[list[float]]:
    """Call again and again in another thread until the block ends and the last call is over.

    Returns: what the calls gave, complete once the block is left.
    Raises: at the end of the block, what a call raised; it was the last one.
    """
    found: list[float] = []
    is_over = Event()

    def work() -> None:
        while not is_over.is_set():
            found.append(send())

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            yield found
        finally:
            is_over.set()
        future.result()


def _measure_window(
    service: SpeechService, requests: Sequence[bytes], index: int, seconds: float, *, long_seconds: list[float] | None
) -> Window:
    stretch = Stretch(warm_seconds=WARM_SECONDS, seconds=seconds, at_edges=lambda: None)
    outcome = closed_loop(service.address, requests, num_connections=NUM_CONNECTIONS, stretch=stretch)
    if not outcome.latencies:
        raise NoAnswer(f"no short recording got an answer within {seconds:g} s; measure for longer")
    return Window(
        round=index,
        has_long=long_seconds is not None,
        num_answers=len(outcome.latencies),
        num_errors=outcome.num_errors,
        p50_seconds=percentile(outcome.latencies, 0.5),
        p95_seconds=percentile(outcome.latencies, 0.95),
        long_seconds=[] if long_seconds is None else long_seconds,  # the last of them ends after the window
    )
