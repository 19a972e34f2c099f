"""Every bundle on a GPU, batched as the service batches, by each of its programs, compiled and by the eager module.

Samples go straight into the service's batcher, and answers come straight out of it: HTTP and decoding, which the
processor does, are measured by `serving`. With the batch cap at 1 nothing is batched.
"""

import asyncio
import itertools
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from benchmarks.figures import percentile
from benchmarks.gpu_attention import measure_attention
from benchmarks.gpu_contestants import CONTESTANTS, choose_bundles, cut_samples, open_contestant
from benchmarks.gpu_report import GpuFinding, Load, render_load
from service.batcher import Batcher
from service.bundle import Bundle
from service.devices import Devices, open_devices
from service.metrics import Metrics, ModelMetrics
from service.opening import check_golden
from service.runtimes.cuda import name_gpu
from service.runtimes.runtime import Runtime
from service.runtimes.warmup import MAX_STREAMS, find_max_batch, fit_length, warm_up
from service.sample import Sample
from service.tasks import TASKS

# The shipped bundles, and those that `make programs` wrote, which have TorchScript programs.
FP32_ROOTS = (Path("bundles"), Path("build/programs"))
FP16_ROOTS = (Path("build/fp16"),)
SAMPLING_SECONDS = 0.05  # between two looks at the GPU's utilisation
TIMEOUT_SECONDS = 600.0
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure.

    Attributes:
        connections: requests in flight.
        streams: batches in flight: 1 shows what copying beside computing is worth.
        seconds: counted of each.
        warm_seconds: before that, not counted.
        sizes: N of the attention.
        repeats: calls at each N.
        contestants: of `CONTESTANTS`.
        num_bundles: at most; None is all.
        max_batch: largest batch to try, if a bundle allows as many.
    """

    connections: tuple[int, ...] = (1, 4, 16, 64, 256)
    streams: tuple[int, ...] = tuple(range(1, MAX_STREAMS + 1))
    seconds: float = 3.0
    warm_seconds: float = 1.0
    sizes: tuple[int, ...] = tuple(1 << power for power in range(9, 18))  # 512 to 131072
    repeats: int = 5
    contestants: tuple[str, ...] = CONTESTANTS
    num_bundles: int | None = None
    max_batch: int = 1024


QUICK = Plan(
    connections=(1, 4),
    streams=(1, 2),
    seconds=0.05,
    warm_seconds=0.02,
    sizes=(256,),
    repeats=1,
    num_bundles=1,
    max_batch=2,
)

# On the CPU, where batches of many and in flight beside each other pay little, to compare what runs a bundle.
ON_CPU = Plan(connections=(1, 8), streams=(1,), seconds=1.5, warm_seconds=0.3, sizes=(), max_batch=8)


def measure_gpu(device: str, plan: Plan, *, cache: Path, roots: Sequence[Path]) -> GpuFinding:
    """Measure every bundle and the attention.

    Args:
        device: `cuda:N`, or `cpu` to try the command.
        plan: how much.
        cache: folder for batch caps and what is compiled.
        roots: folders of bundles.
    Raises: RuntimeError if torch finds no such GPU; FileNotFoundError if there are no bundles.
    """
    if fault := find_fault(device):
        raise RuntimeError(fault)
    bundles = choose_bundles(roots)
    if not bundles:
        raise FileNotFoundError(f"no bundle in {', '.join(map(str, roots))}; run from the root of the repository")
    finding = GpuFinding(device=_describe(device))
    for bundle in bundles[: plan.num_bundles]:
        for name in plan.contestants:
            print(f"{bundle.folder}, {name}", flush=True)
            try:
                with open_contestant(bundle, name, device, cache=cache) as runtime:
                    check_golden(runtime, bundle, *bundle.read_golden())
                    for load in _measure_contestant(bundle, runtime, plan, cache):
                        finding.loads.append(load)
                        print(render_load(load), flush=True)
            except Exception as error:  # noqa: BLE001 - one of them must not cost what an hour found of the others
                finding.left_out.append(f"{bundle.folder}, {name}: {_tell(error)}")
                print(f"left out: {finding.left_out[-1]}", flush=True)
    finding.attention.extend(measure_attention(torch.device(device), plan.sizes, repeats=plan.repeats))
    return finding


def find_fault(device: str) -> str | None:
    """Tell why a device cannot be measured here, and the remedy; None if it can."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device in {"cpu", *found}:
        return None
    if found:
        return f"--device {device}, but torch finds {', '.join(found)}; name one of them, or cpu"
    return (
        f"--device {device}, but torch {torch.__version__} finds no CUDA; install a build of torch with CUDA beside "
        "requirements/serve-cuda.txt on a machine with an NVIDIA GPU, or try the command with --device cpu --quick"
    )


def _describe(device: str) -> str:
    versions = f"torch {torch.__version__}"
    if device == "cpu":
        return f"{device}; {versions}"
    gpu = name_gpu(int(device.removeprefix("cuda:")))
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{device}, {gpu}; {versions}, {cuda}, {read_driver(DRIVER)}"


def read_driver(file: Path) -> str:
    """Tell the version of NVIDIA's driver, which torch does not know, from what its kernel module says.

    Args:
        file: as at `DRIVER`.
    """
    try:
        found = re.search(r"Kernel Module.*?\s(\d[\d.]*)\s", file.read_text())
    except OSError:
        found = None
    return f"driver {found[1]}" if found else "a driver that does not tell its version"


def _tell(error: Exception) -> str:
    """Give an error's class and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _measure_contestant(bundle: Bundle, runtime: Runtime, plan: Plan, cache: Path) -> Iterator[Load]:
    manifest = bundle.manifest
    task = TASKS[manifest.task]
    outputs = task.outputs(task.Options(), task.Spec.model_validate(manifest.spec))
    inputs, _ = bundle.read_golden()
    buckets = manifest.length_buckets
    cap = find_max_batch(
        runtime,
        fit_length(inputs, buckets[0]) if buckets else inputs,
        outputs=outputs,
        limit=min(manifest.max_batch, plan.max_batch),
        bundle_sha256=bundle.sha256,
        cache=cache,
    )
    samples = cut_samples(bundle)
    if runtime.device != "cpu":  # as the service does
        met = buckets[: bisect_left(buckets, max(sample.length for sample in samples)) + 1]
        warm_up(runtime, inputs, outputs=outputs, max_batch=cap, buckets=met)
    for max_batch, num_streams in itertools.product(sorted({1, cap}), plan.streams):
        for number in plan.connections:
            batcher = Batcher(
                runtime,
                ModelMetrics(Metrics(), manifest.name),
                max_batch=max_batch,
                max_queue=number,
                buckets=buckets,
                short_length=manifest.short_length,
            )
            with _watch(runtime.device, after_seconds=plan.warm_seconds) as utilisation:
                latencies, seconds = asyncio.run(
                    _drive(batcher, samples, outputs, num_streams=num_streams, number=number, plan=plan)
                )
            yield Load(
                model=manifest.name,
                bundle=str(bundle.folder),
                precision=manifest.precision,
                contestant=runtime.name,
                max_batch=max_batch,
                num_streams=num_streams,
                num_connections=number,
                rate=len(latencies) / seconds,
                p50_seconds=percentile(latencies, 0.5),
                p99_seconds=percentile(latencies, 0.99),
                utilisation=mean(utilisation) if utilisation else None,
            )


async def _drive(
    batcher: Batcher, samples: Sequence[Sample], outputs: tuple[str, ...], *, num_streams: int, number: int, plan: Plan
) -> tuple[list[float], float]:
    """Keep so many requests in flight; gives the latencies of those that were answered in the counted part, and it.

    Raises: what a request was answered with, if one fails.
    """
    batcher.start(num_streams)
    supply = itertools.cycle(samples)
    begin = time.perf_counter() + plan.warm_seconds
    latencies: list[float] = []

    async def ask() -> None:
        now = time.perf_counter()
        while now < begin + plan.seconds or not latencies:  # at least one, however slow it is
            ticket = batcher.admit(TIMEOUT_SECONDS)
            batcher.put(ticket, next(supply), outputs, len)
            await ticket.future
            sent, now = now, time.perf_counter()
            if now >= begin:
                latencies.append(now - sent)

    try:
        await asyncio.gather(*(ask() for _ in range(number)))
        seconds = time.perf_counter() - begin
        await batcher.drain()
    finally:
        batcher.close()  # its workers would go on, on a runtime that is closed next
    return latencies, seconds


@contextmanager
def _watch(device: str, devices: Devices | None = None, *, after_seconds: float = 0.0) -> Iterator[list[float]]:
    """Collect the GPU's utilisation until the block ends; nothing on the CPU or without NVML.

    NVML numbers GPUs of the machine: set no CUDA_VISIBLE_DEVICES that changes their order.

    Args:
        device: `cpu` or `cuda:N`.
        devices: that are read; None finds them.
        after_seconds: as much of the block's begin is not watched.
    """
    found: list[float] = []
    devices = devices or (open_devices() if device != "cpu" else None)
    if devices is None:
        yield found
        return
    index = int(device.removeprefix("cuda:"))
    is_over = threading.Event()

    def look() -> None:
        is_over.wait(after_seconds)
        while not is_over.wait(SAMPLING_SECONDS):
            state = devices.read()[index]
            if state.utilisation_ratio is not None:
                found.append(state.utilisation_ratio)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()
