"""What attention costs on a GPU as N grows: torch's full attention, also in float16, clustered and improved attention.

Sizes, heads and settings are those of `benchmarks.attention_scaling`; here torch runs all of them, and the clock is the
wall's, as the GPU works beside the processor.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.attention_scaling import KINDS, NUM_CLUSTERS, NUM_ITERATIONS, YARDSTICK
from benchmarks.attention_worker import HEAD_DIM, make_inputs
from models.clustered_attention import attend

HALF = f"{YARDSTICK}, float16"  # for which GPUs have faster units and kernels; clusters are chosen in float32
Attend = Callable[[dict[str, Tensor]], object]


@dataclass(frozen=True, kw_only=True)
class AttentionPoint:
    """One attention at one N.

    Attributes:
        seconds: median of the calls.
        peak_bytes: most memory of the GPU beyond the inputs; None on the CPU, where torch does not count it.
    """

    attention: str
    num_tokens: int
    seconds: float
    peak_bytes: int | None


def measure_attention(device: torch.device, sizes: Sequence[int], *, repeats: int) -> list[AttentionPoint]:
    """Measure all of them at each N, in turns.

    Args:
        device: that computes.
        sizes: N, ascending; one for which memory does not suffice is left out.
        repeats: calls that are timed, after one that is not.
    """
    points = []
    for num_tokens in sizes:
        inputs = {name: torch.from_numpy(array).to(device) for name, array in make_inputs(num_tokens).items()}
        for name, run in _contestants().items():
            try:
                given = _halve(inputs) if name == HALF else inputs
                points.append(_measure(name, run, given, device, repeats))
            except torch.OutOfMemoryError:
                print(f"{name}: no memory at N = {num_tokens}", flush=True)
    return points


def render_attention(points: Sequence[AttentionPoint]) -> str:
    """Write a table as Markdown."""
    lines = ["| attention | N | ms of a call | peak memory, MB |", "|---|---|---|---|"]
    for point in points:
        memory = f"{point.peak_bytes / 1e6:.0f}" if point.peak_bytes is not None else ""
        lines.append(f"| {point.attention} | {point.num_tokens} | {point.seconds * 1e3:.2f} | {memory} |")
    return "\n".join(lines)


def plot_attention(points: Sequence[AttentionPoint], path: Path) -> None:
    """Draw the time against N, both axes logarithmic, as PNG."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(point.attention for point in points):
        own = [point for point in points if point.attention == name]
        axis.plot([point.num_tokens for point in own], [point.seconds * 1e3 for point in own], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="ms of a call")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def _contestants() -> dict[str, Attend]:
    def full(inputs: dict[str, Tensor]) -> object:
        return torch.nn.functional.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"])

    def clustered(top_k: int) -> Attend:
        return lambda inputs: attend(
            *(inputs[name] for name in ("q", "k", "v", "planes", "query_lengths", "key_lengths")),
            num_clusters=NUM_CLUSTERS,
            num_iterations=NUM_ITERATIONS,
            top_k=top_k,
            scale=HEAD_DIM**-0.5,
            metric="lsh",
            full_below=0,
        )

    return {YARDSTICK: full, HALF: full} | {kind: clustered(top_k) for kind, top_k in KINDS.items()}


def _halve(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name].half() for name in ("q", "k", "v")}


@torch.inference_mode()
def _measure(name: str, run: Attend, inputs: dict[str, Tensor], device: torch.device, repeats: int) -> AttentionPoint:
    is_cuda = device.type == "cuda"
    before = 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run(inputs)
        if is_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return AttentionPoint(
        attention=name,
        num_tokens=len(inputs["q"][0, 0]),
        seconds=median(times[1:]),
        peak_bytes=torch.cuda.max_memory_allocated(device) - before if is_cuda else None,
    )
