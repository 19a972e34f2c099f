"""Warm-up: how large a batch pays on this machine, remembered by bundle and machine.

A larger batch makes everybody in it wait longer, so the smallest one that is nearly as fast per sample is the cap.
"""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from service.runtimes.runtime import Runtime
from service.sample import Arrays
from service.settings import count_cores

logger = logging.getLogger(__name__)

REPEATS = 5
# Estimate of what a batch of any size costs besides its run: waking the worker, the event loop and the clients,
# caches lost. With it, the cap agrees with the throughput at 64 connections under forced caps (docs/log.md).
SECONDS_PER_BATCH = 0.002
WORTH = 1.02  # a batch is as good as the best if a sample in it takes at most 2 % longer


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
    try:
        return min(limit, max(1, int(json.loads(path.read_text())["max_batch"])))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        found = _measure(runtime, example, outputs, limit)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"max_batch": found}) + "\n")
    except OSError as error:
        logger.warning("what warm-up found cannot be kept in %s: %s; the next start measures again", cache, error)
    return found


def _measure(runtime: Runtime, example: Arrays, outputs: Sequence[str], limit: int) -> int:
    sizes = [1 << power for power in range(limit.bit_length()) if 1 << power < limit] + [limit]
    batches = {
        size: {name: np.resize(array, (size, *array.shape[1:])) for name, array in example.items()} for size in sizes
    }
    # In turns, so that a busy moment of the machine does not hit one size alone.
    rounds = [{size: _time(runtime, batch, outputs) for size, batch in batches.items()} for _ in range(REPEATS)]
    seconds_per_sample = {size: (min(found[size] for found in rounds) + SECONDS_PER_BATCH) / size for size in sizes}
    best = min(seconds_per_sample.values())
    return next(size for size in sizes if seconds_per_sample[size] <= WORTH * best)


def _time(runtime: Runtime, batch: Arrays, outputs: Sequence[str]) -> float:
    # On the CPU the calling thread does all the work, and what it used does not depend on what else the machine does.
    clock = time.thread_time if runtime.device == "cpu" else time.perf_counter
    start = clock()
    runtime.run(batch, outputs)
    return clock() - start


def _fingerprint(runtime: Runtime, limit: int, bundle_sha256: str) -> str:
    machine = (platform.machine(), _processor(), count_cores(), runtime.name, runtime.device, runtime.version, limit)
    return hashlib.sha256(repr((bundle_sha256, machine, WORTH, SECONDS_PER_BATCH)).encode()).hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), "")
