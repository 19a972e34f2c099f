"""How long the service takes from its start to its first answer: without and with what an earlier warm-up found."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.contestants import run_ours
from benchmarks.inputs import cut_jpegs

NUM_STARTS = 4


def measure_startup(bundle: Path, scratch: Path) -> list[float]:
    """Start the service several times over, the first time with an empty cache.

    Args:
        bundle: its folder.
        scratch: folder for the log.
    Returns: seconds from each start of the process to its first answer.
    """
    picture = cut_jpegs()[0]
    found = []
    with TemporaryDirectory() as cache:
        for _ in range(NUM_STARTS):
            start = time.monotonic()
            with run_ours(bundle, scratch, picture, cache=Path(cache)):
                found.append(time.monotonic() - start)
    return found


def render_startup(seconds: list[float]) -> str:
    """Write one line for each start."""
    return "\n".join(
        f"- Start {number}{' (warm-up measures)' if number == 1 else ' (warm-up remembers)'}: {value:.2f} s"
        for number, value in enumerate(seconds, start=1)
    )
