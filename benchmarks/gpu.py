"""Every bundle on a GPU, batched as the service batches, by each of its programs and by the eager module.

Samples go straight into the service's batcher, and answers come straight out of it: HTTP and decoding, which the
processor does, are measured by `serving`. With the batch cap at 1 nothing is batched.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch

from benchmarks.figures import percentile
from benchmarks.gpu_attention import AttentionPoint, measure_attention
from benchmarks.gpu_contestants import cut_samples, find_folders, list_contestants, open_contestant
from service.batcher import Batcher
from service.bundle import Bundle, open_bundle
from service.devices import Devices, open_devices
from service.metrics import Metrics, ModelMetrics
from service.runtimes.runtime import Runtime
from service.runtimes.warmup import MAX_STREAMS, find_max_batch, fit_length
from service.sample import Sample
from service.tasks import TASKS

# The shipped ones; those that `make programs` wrote, which have TorchScript programs; fp16 programs, if some were made.
ROOTS = (Path("bundles"), Path("build/programs"), Path("build/fp16"))
SAMPLING_SECONDS = 0.05  # between two looks at the GPU's utilisation
TIMEOUT_SECONDS = 600.0


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
        num_bundles: at most; None is all.
        max_batch: largest batch to try, if a bundle allows as many.
    """

    connections: tuple[int, ...] = (1, 4, 16, 64, 256)
    streams: tuple[int, ...] = tuple(range(1, MAX_STREAMS + 1))
    seconds: float = 3.0
    warm_seconds: float = 1.0
    sizes: tuple[int, ...] = tuple(1 << power for power in range(9, 18))  # 512 to 131072
    repeats: int = 5
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


@dataclass(frozen=True, kw_only=True)
class Load:
    """One contestant under one load.

    Attributes:
        bundle: its folder.
        contestant: a runtime, or the eager module.
        max_batch: 1 where nothing is batched.
        rate: samples a second.
        utilisation: share of the time in which some kernel ran, as NVML tells; None where it does not.
    """

    bundle: str
    contestant: str
    max_batch: int
    num_streams: int
    num_connections: int
    rate: float
    p50_seconds: float
    p99_seconds: float
    utilisation: float | None


@dataclass(frozen=True, kw_only=True)
class GpuFinding:
    """All that was measured on one device."""

    device: str
    loads: list[Load] = field(default_factory=list)
    attention: list[AttentionPoint] = field(default_factory=list)


def measure_gpu(device: str, plan: Plan, *, cache: Path, roots: Sequence[Path] = ROOTS) -> GpuFinding:
    """Measure every bundle and the attention.

    Args:
        device: `cuda:N`, or `cpu` to try the command.
        plan: how much.
        cache: folder for batch caps.
        roots: folders of bundles.
    Raises: RuntimeError if torch finds no such GPU; FileNotFoundError if there are no bundles.
    """
    if fault := find_fault(device):
        raise RuntimeError(fault)
    folders = find_folders(roots)
    if not folders:
        raise FileNotFoundError(f"no bundle in {', '.join(map(str, roots))}; run from the root of the repository")
    finding = GpuFinding(device=device)
    for folder in folders[: plan.num_bundles]:
        bundle = open_bundle(folder)
        for name in list_contestants(bundle):
            with open_contestant(bundle, name, device) as runtime:
                if runtime is not None:
                    finding.loads.extend(_measure_contestant(bundle, runtime, plan, cache))
                    print(f"{folder}, {name}: measured", flush=True)
    finding.attention.extend(measure_attention(torch.device(device), plan.sizes, repeats=plan.repeats))
    return finding


def find_fault(device: str) -> str | None:
    """Tell why a device cannot be measured here, and the remedy; None if it can."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    return (
        f"--device {device}, but torch {torch.__version__} finds no CUDA; install a build of torch with CUDA beside "
        "requirements/serve-cuda.txt on a machine with an NVIDIA GPU, or try the command with --device cpu --quick"
    )


def render_gpu(finding: GpuFinding) -> str:
    """Write the loads as a table, Markdown."""
    lines = [
        f"Device: {finding.device}",
        "",
        "| bundle | runs | batch cap | in flight | c | samples/s | p50 ms | p99 ms | GPU busy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for load in finding.loads:
        busy = f"{load.utilisation:.0%}" if load.utilisation is not None else ""
        lines.append(
            f"| {load.bundle} | {load.contestant} | {load.max_batch} | {load.num_streams} | {load.num_connections} | "
            f"{load.rate:.0f} | {load.p50_seconds * 1e3:.2f} | {load.p99_seconds * 1e3:.2f} | {busy} |"
        )
    return "\n".join(lines)


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
            with _watch(runtime.device) as utilisation:
                latencies, seconds = asyncio.run(
                    _drive(batcher, samples, outputs, num_streams=num_streams, number=number, plan=plan)
                )
            yield Load(
                bundle=str(bundle.folder),
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
    """Keep so many requests in flight; gives the latencies of those that were answered in the counted part, and it."""
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

    await asyncio.gather(*(ask() for _ in range(number)))
    seconds = time.perf_counter() - begin
    await batcher.drain()
    batcher.close()
    return latencies, seconds


@contextmanager
def _watch(device: str, devices: Devices | None = None) -> Iterator[list[float]]:
    """Collect the GPU's utilisation until the block ends; nothing on the CPU or without NVML.

    NVML numbers GPUs of the machine: set no CUDA_VISIBLE_DEVICES that changes their order.
    """
    found: list[float] = []
    devices = devices or (open_devices() if device != "cpu" else None)
    if devices is None:
        yield found
        return
    index = int(device.removeprefix("cuda:"))
    is_over = threading.Event()

    def look() -> None:
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
