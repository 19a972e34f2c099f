"""The yardstick: ONNX Runtime in a tight loop without HTTP, `python -m benchmarks.bare BUNDLE`.

One thread per core calls one shared session with one thread inside each call. Reads jobs from standard input and writes
what it measured to standard output, one JSON object a line each, so that it stays warm between jobs.
"""

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from benchmarks.inputs import cut_jpegs
from service.bundle import open_bundle
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.tasks.image_classification import ImageClassificationSpec
from service.tasks.pictures import decode_picture

Pixels = npt.NDArray[np.uint8]


class Job(BaseModel):
    """What to measure.

    Attributes:
        num_threads: that loop beside each other.
        batch: pictures in one call.
        decodes: whether each picture is decoded from its JPEG file first.
        warm_seconds: not counted.
        seconds: counted.
    """

    num_threads: int
    batch: int
    decodes: bool
    warm_seconds: float
    seconds: float


class Finding(BaseModel):
    """What a job measured.

    Attributes:
        rate: pictures a second.
        latencies: seconds of each call, its decoding included.
        cpu_seconds: of the process for one picture.
        process_seconds: CPU time of the process for the whole job, what was not counted included.
    """

    rate: float
    latencies: list[float]
    cpu_seconds: float
    process_seconds: float


@dataclass(frozen=True)
class _Program:
    runtime: OnnxRuntime
    spec: ImageClassificationSpec
    files: list[bytes]
    pictures: list[Pixels]

    def decoded(self, batch: int) -> Iterator[Pixels]:
        files = itertools.cycle(self.files)
        while True:
            yield np.stack([decode_picture(next(files), self.spec) for _ in range(batch)])

    def ready(self, batch: int) -> Iterator[Pixels]:
        pictures = itertools.cycle(self.pictures)
        while True:
            yield np.stack([next(pictures) for _ in range(batch)])


def open_program(folder: Path) -> _Program:
    """Load the program of a bundle, and the pictures to run it on."""
    bundle = open_bundle(folder)
    spec = ImageClassificationSpec.model_validate(bundle.manifest.spec)
    files = cut_jpegs()
    runtime = open_onnx(folder / bundle.manifest.programs["onnx"], device="cpu")
    return _Program(runtime, spec, files, [decode_picture(file, spec) for file in files])


def measure(program: _Program, job: Job) -> Finding:
    """Do a job; the rate is the sum over threads, so that no thread's last batch is waited for."""
    begin = time.process_time()
    source = program.decoded if job.decodes else program.ready
    _loop(program.runtime, source, job, job.warm_seconds)
    start = time.process_time()
    threads = _loop(program.runtime, source, job, job.seconds)
    end = time.process_time()
    latencies = [seconds for thread in threads for seconds in thread]
    return Finding(
        rate=sum(len(thread) * job.batch / sum(thread) for thread in threads),
        latencies=latencies,
        cpu_seconds=(end - start) / (len(latencies) * job.batch),
        process_seconds=end - begin,
    )


def _loop(
    runtime: OnnxRuntime, source: Callable[[int], Iterator[Pixels]], job: Job, seconds: float
) -> list[list[float]]:
    results: list[list[float]] = [[] for _ in range(job.num_threads)]

    def work(latencies: list[float]) -> None:
        batches = source(job.batch)
        now = time.perf_counter()
        end = now + seconds
        while now < end:
            before = now
            runtime.run({"image": next(batches)}, ("logits",))
            now = time.perf_counter()
            latencies.append(now - before)

    threads: list[Any] = [threading.Thread(target=work, args=(result,)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def main() -> None:
    """Do jobs until standard input ends."""
    program = open_program(Path(sys.argv[1]))
    for line in sys.stdin:
        print(measure(program, Job.model_validate_json(line)).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
