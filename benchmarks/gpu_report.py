"""What `benchmarks.gpu` found, and how it is written: who was fastest, who was left out, and every load."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.gpu_attention import AttentionPoint

YARDSTICK = ("onnx", "fp32")  # the contestant and the precision that all bundles here are shipped with


@dataclass(frozen=True, kw_only=True)
class Load:
    """One contestant under one load.

    Attributes:
        model: the bundle's name, whatever its precision.
        bundle: its folder.
        precision: of the bundle.
        contestant: a runtime, the compiled module or the eager one.
        max_batch: 1 where nothing is batched.
        num_streams: batches in flight.
        num_connections: requests in flight.
        rate: samples a second.
        utilisation: share of the time in which some kernel ran, as NVML tells; None where it does not.
    """

    model: str
    bundle: str
    precision: str
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
    """All that was measured on one device.

    Attributes:
        device: with its product's name and the versions of what drives it.
        left_out: contestants that did not run to the end, and why.
    """

    device: str
    loads: list[Load] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    attention: list[AttentionPoint] = field(default_factory=list)


def render_gpu(finding: GpuFinding) -> str:
    """Write what each contestant did at best, who was left out, and all loads, Markdown."""
    left_out = [f"- {line}" for line in finding.left_out] or ["Nobody."]
    return "\n".join(
        [
            f"Device: {finding.device}",
            "",
            "## At best",
            "",
            "Most samples a second at any load, beside those of the same model's ONNX program in fp32; most unbatched;",
            "and the mean time of a sample where one is in flight.",
            "",
            *_render_best(finding.loads),
            "",
            "## Left out",
            "",
            *left_out,
            "",
            "## All loads",
            "",
            "| bundle | precision | runs | batch cap | in flight | c | samples/s | p50 ms | p99 ms | GPU busy |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(render_load, finding.loads),
        ]
    )


def render_load(load: Load) -> str:
    """Write one row of the table of all loads."""
    return (
        f"| {load.bundle} | {load.precision} | {load.contestant} | {load.max_batch} | {load.num_streams} | "
        f"{load.num_connections} | {load.rate:.1f} | {load.p50_seconds * 1e3:.2f} | {load.p99_seconds * 1e3:.2f} | "
        f"{_render_share(load.utilisation)} |"
    )


def _render_best(loads: Sequence[Load]) -> list[str]:
    lines = [
        "| model | precision | runs | samples/s | ÷ ONNX fp32 | cap | flight | c | busy | unbatched | ms, c = 1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    contestants = dict.fromkeys((load.model, load.precision, load.contestant) for load in loads)
    for model, precision, contestant in contestants:
        own = _select(loads, model, precision, contestant)
        best = max(own, key=_rate)
        yardstick = max(_select(loads, model, YARDSTICK[1], YARDSTICK[0]), key=_rate, default=None)
        ratio = f"{best.rate / yardstick.rate:.2f}" if yardstick else ""
        unbatched = max(load.rate for load in own if load.max_batch == 1)
        alone = max(load.rate for load in own if load.num_connections == 1)
        lines.append(
            f"| {model} | {precision} | {contestant} | {best.rate:.1f} | {ratio} | {best.max_batch} | "
            f"{best.num_streams} | {best.num_connections} | {_render_share(best.utilisation)} | {unbatched:.1f} | "
            f"{1e3 / alone:.2f} |"
        )
    return lines


def _select(loads: Sequence[Load], model: str, precision: str, contestant: str) -> list[Load]:
    return [load for load in loads if (load.model, load.precision, load.contestant) == (model, precision, contestant)]


def _rate(load: Load) -> float:
    return load.rate


def _render_share(share: float | None) -> str:
    return f"{share:.0%}" if share is not None else ""
