"""Warm-up: how large a batch and how many of them at once pay on this machine, remembered by bundle and machine.

A larger batch makes everybody in it wait longer, and one more in flight takes memory, so the smallest number that is
nearly as fast is taken. On a GPU the batches that will come are also run once, before the first request does.
"""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from service.collate import LENGTHS, scale_max_batch
from service.runtimes.cuda import name_gpu
from service.runtimes.runtime import Runtime
from service.sample import Arrays
from service.settings import count_cores

logger = logging.getLogger(__name__)

REPEATS = 5
# Estimate of what a batch of any size costs besides its run: waking the worker, the event loop and the clients,
# caches lost. With it, the cap agrees with the throughput at 64 connections under forced caps (docs/log.md).
SECONDS_PER_BATCH = 0.002
WORTH = 1.02  # a batch is as good as the best if a sample in it takes at most 2 % longer
MAX_STREAMS = 3  # one copies in, one computes, one copies out: a fourth has nothing left to overlap with
RUNS_PER_STREAM = 8  # in one measurement of streams: copies and computation fall into step after a few

RunTogether = Callable[[int, Callable[[], object]], None]  # on so many threads, each RUNS_PER_STREAM times


def find_max_batch(
    runtime: Runtime, example: Arrays, *, outputs: Sequence[str], limit: int, bundle_sha256: str, cache: Path
) -> int:
    """Find the batch size beyond which larger batches no longer pay, or remember it.

    Args:
        runtime: to be measured.
        example: inputs (B, …) by name; their rows are repeated to fill a batch.
        outputs: those that a usual request needs.
        limit: largest batch allowed.
        bundle_sha256: of the bundle that the runtime runs.
        cache: folder for findings.
    Returns: between 1 and `limit`.
    """
    path = cache / f"max-batch-{_fingerprint(runtime, limit, bundle_sha256)}.json"
    return _remember(path, "max_batch", limit, lambda: _measure(runtime, example, outputs, limit))


def find_num_streams(
    runtime: Runtime,
    example: Arrays,
    *,
    outputs: Sequence[str],
    batch: int,
    bundle_sha256: str,
    cache: Path,
    run_together: RunTogether | None = None,
) -> int:
    """Find how many batches in flight keep a GPU busy, or remember it; see `find_max_batch`.

    Args:
        batch: samples in each.
        run_together: runs something on several threads.
    Returns: between 1 and `MAX_STREAMS`.
    """
    path = cache / f"streams-{_fingerprint(runtime, batch, bundle_sha256)}.json"
    together = run_together or _run_together

    def measure() -> int:
        inputs = _fill(example, batch)
        numbers = range(1, MAX_STREAMS + 1)

        def time_streams(number: int) -> float:
            start = time.perf_counter()
            together(number, lambda: runtime.run(inputs, outputs))
            return (time.perf_counter() - start) / (number * RUNS_PER_STREAM)

        rounds = [{number: time_streams(number) for number in numbers} for _ in range(REPEATS)]
        seconds = {number: min(found[number] for found in rounds) for number in numbers}
        return next(number for number in numbers if seconds[number] <= WORTH * min(seconds.values()))

    return _remember(path, "num_streams", MAX_STREAMS, measure)


def warm_up(
    runtime: Runtime, example: Arrays, *, outputs: Sequence[str], max_batch: int, buckets: Sequence[int]
) -> None:
    """Run batches of each size and length once: a GPU chooses its kernels when it meets a shape, which takes long.

    Sizes between two powers of two are not run: the same kernels suit them.

    Args:
        runtime: to be warmed up.
        example: inputs (B, …) by name.
        outputs: those that a usual request needs.
        max_batch: of the first bucket.
        buckets: lengths that will come; empty where all samples have one shape.
    """
    for bucket in buckets or (0,):
        fitting = fit_length(example, bucket) if buckets else example
        for size in _sizes(scale_max_batch(max_batch, bucket, buckets)):
            runtime.run(_fill(fitting, size), outputs)


def fit_length(inputs: Arrays, length: int) -> Arrays:
    """Cut samples (B, N, …) to a length, or repeat them up to it.

    Returns: arrays (B, length, …) by name, and their lengths.
    """
    longest = max(array.shape[1] for name, array in inputs.items() if name != LENGTHS)
    lengths = np.minimum(inputs[LENGTHS], length) if length <= longest else np.full_like(inputs[LENGTHS], length)
    fitted = {
        name: array.take(np.arange(length), axis=1, mode="wrap") for name, array in inputs.items() if name != LENGTHS
    }
    return fitted | {LENGTHS: lengths}


def _remember(path: Path, key: str, limit: int, measure: Callable[[], int]) -> int:
    """Read a number from 1 to `limit` from a file, or measure it and write the file."""
    try:
        return min(limit, max(1, int(json.loads(path.read_text())[key])))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        found = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({key: found}) + "\n")
    except OSError as error:
        logger.warning("what warm-up found cannot be kept in %s: %s; the next start measures again", path.parent, error)
    return found


def _measure(runtime: Runtime, example: Arrays, outputs: Sequence[str], limit: int) -> int:
    sizes = _sizes(limit)
    batches = {size: _fill(example, size) for size in sizes}
    # In turns, so that a busy moment of the machine does not hit one size alone.
    rounds = [{size: _time(runtime, batch, outputs) for size, batch in batches.items()} for _ in range(REPEATS)]
    seconds_per_sample = {size: (min(found[size] for found in rounds) + SECONDS_PER_BATCH) / size for size in sizes}
    best = min(seconds_per_sample.values())
    return next(size for size in sizes if seconds_per_sample[size] <= WORTH * best)


def _sizes(limit: int) -> list[int]:
    return [1 << power for power in range(limit.bit_length()) if 1 << power < limit] + [limit]


def _fill(example: Arrays, size: int) -> Arrays:
    return {name: np.resize(array, (size, *array.shape[1:])) for name, array in example.items()}


def _time(runtime: Runtime, batch: Arrays, outputs: Sequence[str]) -> float:
    # On the CPU the calling thread does all the work, and what it used does not depend on what else the machine does.
    clock = time.thread_time if runtime.device == "cpu" else time.perf_counter
    start = clock()
    runtime.run(batch, outputs)
    return clock() - start


def _run_together(number: int, run: Callable[[], object]) -> None:
    with ThreadPoolExecutor(number) as threads:
        for one in [threads.submit(lambda: [run() for _ in range(RUNS_PER_STREAM)]) for _ in range(number)]:
            one.result()


def _fingerprint(runtime: Runtime, limit: int, bundle_sha256: str) -> str:
    _, _, gpu = runtime.device.partition(":")
    computer = _processor(), count_cores(), name_gpu(int(gpu)) if gpu else ""
    machine = (platform.machine(), *computer, runtime.name, runtime.device, runtime.version, limit)
    return hashlib.sha256(repr((bundle_sha256, machine, WORTH, SECONDS_PER_BATCH)).encode()).hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), "")
