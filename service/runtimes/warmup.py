"""Warm-up: how large a batch and how many of them at once pay on this machine, remembered by bundle and machine.

A larger batch makes everybody in it wait longer, and one more in flight takes memory, so the smallest number that is
nearly as fast is taken, and none for which memory runs out. On a GPU the batches that will come are also run once,
before the first request does.
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
from service.errors import BundleError
from service.runtimes.by_device import is_out_of_memory
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
    Raises: BundleError if the memory does not suffice for one sample.
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
    Raises: BundleError if the memory does not suffice for one batch at a time.
    """
    path = cache / f"streams-{_fingerprint(runtime, batch, bundle_sha256)}.json"
    together = run_together or _run_together

    def measure() -> int:
        inputs = _fill(example, batch)

        def time_streams(number: int) -> float:
            start = time.perf_counter()
            together(number, lambda: runtime.run(inputs, outputs))
            return (time.perf_counter() - start) / (number * RUNS_PER_STREAM)

        numbers = range(1, MAX_STREAMS + 1)
        seconds = _time_what_fits(numbers, time_streams, f"batches of {batch} samples at a time", runtime.device)
        return next(number for number in seconds if seconds[number] <= WORTH * min(seconds.values()))

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
    Raises: BundleError if the memory does not suffice for one of them.
    """
    for bucket in buckets or (0,):
        fitting = fit_length(example, bucket) if buckets else example
        for size in _sizes(scale_max_batch(max_batch, bucket, buckets)):
            try:
                runtime.run(_fill(fitting, size), outputs)
            except Exception as error:  # each runtime's library has exceptions of its own
                if not is_out_of_memory(error):
                    raise
                length = f" of length {bucket}" if buckets else ""
                raise _too_little_memory(f"a batch of {size} samples{length}", runtime.device) from error


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
    batches = {size: _fill(example, size) for size in _sizes(limit)}
    seconds = _time_what_fits(
        list(batches), lambda size: _time(runtime, batches[size], outputs), "samples in a batch", runtime.device
    )
    seconds_per_sample = {size: (best + SECONDS_PER_BATCH) / size for size, best in seconds.items()}
    best = min(seconds_per_sample.values())
    return next(size for size, found in seconds_per_sample.items() if found <= WORTH * best)


def _time_what_fits(
    numbers: Sequence[int], time_one: Callable[[int], float], unit: str, device: str
) -> dict[int, float]:
    """Time each of some ascending numbers, up to the first for which memory runs out.

    Args:
        numbers: to be timed.
        time_one: gives the seconds of one of them.
        unit: what they count, for messages.
        device: where they run, for messages.
    Returns: number → seconds, the best of all rounds; at least one.
    Raises: BundleError if the first one does not fit.
    """
    rounds: list[dict[int, float]] = []
    # In turns, so that a busy moment of the machine does not hit one number alone.
    for _ in range(REPEATS):
        rounds.append({})
        for number in numbers:
            try:
                rounds[-1][number] = time_one(number)
            except Exception as error:  # each runtime's library has exceptions of its own
                if not is_out_of_memory(error):
                    raise
                if number == numbers[0]:
                    raise _too_little_memory(f"{number} {unit}", device) from error
                numbers = list(rounds[-1])
                logger.warning(
                    "memory of %s ran out with %d %s; at most %d run there until SERVICE_CACHE is emptied",
                    device, number, unit, numbers[-1],
                )  # fmt: skip
                break
    return {number: min(found[number] for found in rounds) for number in numbers}


def _too_little_memory(what: str, device: str) -> BundleError:
    return BundleError(
        f"memory of {device} ran out with {what}; that much has to fit; free some, choose another SERVICE_DEVICE, or "
        "export the bundle with a smaller --max-batch"
    )


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
