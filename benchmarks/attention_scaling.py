"""What attention costs as recordings grow: full, clustered and improved-clustered, time and memory against N.

Every contestant has a process of its own, one thread, the same random inputs; they take turns at each N.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnx
from matplotlib.figure import Figure
from onnx import TensorProto, helper

from benchmarks.attention_worker import HEAD_DIM, NUM_HEADS, NUM_PLANES, Finding, Job
from export.build_native import build_native
from export.clustered_operator import DOMAIN, INPUTS, NAME, OUTPUTS, VERSION, add_body, make_body
from export.onnx_program import OPSET

NUM_CLUSTERS, TOP_K, NUM_ITERATIONS = 100, 32, 10
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
MOST_OF_FULL = 16384  # four times as long for each step: at 65536 a call would take minutes
YARDSTICK = "full, torch SDPA"
FULL_ONNX = "full, ONNX Runtime"
KINDS = {"clustered": 0, "improved": TOP_K}
Shape = list[str | int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure.

    Attributes:
        sizes: N, ascending.
        rounds: of all contestants at each N.
        repeats: calls in a round.
    """

    sizes: tuple[int, ...] = SIZES
    rounds: int = 3
    repeats: int = 2


@dataclass(frozen=True, kw_only=True)
class Point:
    """One contestant at one N: medians over rounds.

    Attributes:
        to_full: CPU time over that of the yardstick in the same round; None where that was not measured.
    """

    contestant: str
    num_tokens: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    to_full: float | None


def measure_scaling(folder: Path, plan: Plan) -> list[Point]:
    """Measure all contestants.

    Args:
        folder: for the programs; made if missing.
        plan: how much.
    Raises: RuntimeError if the native kernel cannot be built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    commands = write_programs(folder, build_native())
    points: list[Point] = []
    for num_tokens in plan.sizes:
        with ExitStack() as stack:  # new processes: a session keeps the memory that it once had
            workers = {name: stack.enter_context(_run_worker(name, command)) for name, command in commands.items()}
            rounds = [_measure_round(workers, num_tokens, plan, shift) for shift in range(plan.rounds)]
        points += summarise(num_tokens, rounds)
        print(f"N = {num_tokens} measured", flush=True)
    return points


def write_programs(folder: Path, library: Path) -> dict[str, list[str]]:
    """Write the programs, one attention each.

    Returns: contestant → arguments of its worker: none, a program, or a program and the kernel's library.
    """
    full = folder / "full.onnx"
    full.write_bytes(make_full_program().SerializeToString())
    commands = {YARDSTICK: [], FULL_ONNX: [str(full)]}
    for kind, top_k in KINDS.items():
        path = folder / f"{kind}.onnx"
        path.write_bytes(make_clustered_program(top_k).SerializeToString())
        commands[f"{kind}, body"] = [str(path)]
        commands[f"{kind}, kernel"] = [str(path), str(library)]
    return commands


def make_clustered_program(top_k: int) -> onnx.ModelProto:
    """One node of our operator, with its body."""
    settings: dict[str, Any] = {
        "num_clusters": NUM_CLUSTERS,
        "num_iterations": NUM_ITERATIONS,
        "top_k": top_k,
        "scale": HEAD_DIM**-0.5,
        "metric": "lsh",
        "full_below": 0,
    }
    heads: Shape = ["batch", NUM_HEADS, "tokens", HEAD_DIM]
    planes: Shape = [NUM_PLANES, HEAD_DIM + 1]
    lengths: Shape = ["batch"]
    shapes = dict(zip(INPUTS, (heads, heads, heads, planes, lengths, lengths), strict=True))
    graph = helper.make_graph(
        [helper.make_node(NAME, list(INPUTS), list(OUTPUTS), domain=DOMAIN, **settings)],
        "attention",
        [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if name.endswith("lengths") else TensorProto.FLOAT, shape
            )
            for name, shape in shapes.items()
        ],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, heads),
            helper.make_tensor_value_info("clusters", TensorProto.INT32, heads[:3]),
        ],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    body = make_body(settings, opset=OPSET)
    add_body(model, body)
    return model


def make_full_program() -> onnx.ModelProto:
    """Full attention as ONNX Runtime's own fused operator does it, with the same inputs (B, H, N, D)."""
    heads: Shape = ["batch", NUM_HEADS, "tokens", HEAD_DIM]
    to_tokens = [
        node
        for name in ("q", "k", "v")
        for node in (
            helper.make_node("Transpose", [name], [f"{name}_turned"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"{name}_turned", "shape"], [f"{name}_tokens"]),
        )
    ]
    names = [f"{name}_tokens" for name in ("q", "k", "v")]
    attention = helper.make_node("MultiHeadAttention", names, ["out"], domain="com.microsoft", num_heads=NUM_HEADS)
    graph = helper.make_graph(
        [*to_tokens, attention],
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, heads) for name in ("q", "k", "v")],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "tokens", NUM_HEADS * HEAD_DIM])],
        [helper.make_tensor("shape", TensorProto.INT64, [3], [0, 0, -1])],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def summarise(num_tokens: int, rounds: Sequence[Mapping[str, Finding]]) -> list[Point]:
    """Take medians over rounds; ratios are taken within a round."""
    points = []
    for name in rounds[0]:
        found = [one[name] for one in rounds]
        to_full = [one[name].cpu_seconds / one[YARDSTICK].cpu_seconds for one in rounds if YARDSTICK in one]
        points.append(
            Point(
                contestant=name,
                num_tokens=num_tokens,
                cpu_seconds=median(finding.cpu_seconds for finding in found),
                wall_seconds=median(finding.wall_seconds for finding in found),
                peak_bytes=max(finding.peak_bytes for finding in found),
                to_full=median(to_full) if to_full else None,
            )
        )
    return points


def render_scaling(points: Sequence[Point]) -> str:
    """Write two tables as Markdown: CPU time and peak memory."""
    sizes = sorted({point.num_tokens for point in points})
    names = list(dict.fromkeys(point.contestant for point in points))
    found = {(point.contestant, point.num_tokens): point for point in points}

    def cell_of_time(point: Point) -> str:
        ratio = f" ({point.to_full:.3f})" if point.to_full is not None and point.contestant != YARDSTICK else ""
        return f"{point.cpu_seconds * 1e3:.1f}{ratio}"

    def table(cell: Any) -> str:
        head = "| contestant | " + " | ".join(f"N = {size}" for size in sizes) + " |\n|---" * 1
        lines = [head + "|---" * len(sizes) + "|"]
        for name in names:
            cells = [cell(found[name, size]) if (name, size) in found else "" for size in sizes]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    return f"""H = {NUM_HEADS}, D = {HEAD_DIM}, C = {NUM_CLUSTERS}, K = {TOP_K}, {NUM_PLANES} bits, {NUM_ITERATIONS} \
iterations, batch 1, float32, one thread.

CPU-ms of one call; in brackets the ratio to `{YARDSTICK}` in the same round:

{table(cell_of_time)}

Peak memory of one call beyond its inputs, MB:

{table(lambda point: f"{point.peak_bytes / 1e6:.0f}")}"""


def plot_scaling(points: Sequence[Point], path: Path) -> None:
    """Draw CPU time and peak memory against N, both axes logarithmic, as PNG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    for name in dict.fromkeys(point.contestant for point in points):
        of_name = [point for point in points if point.contestant == name]
        sizes = [point.num_tokens for point in of_name]
        style = "--" if name.startswith("full") else "-"
        time_axis.plot(sizes, [point.cpu_seconds * 1e3 for point in of_name], style, marker="o", label=name)
        seen = [(point.num_tokens, point.peak_bytes / 1e6) for point in of_name if point.peak_bytes]
        memory_axis.plot(*zip(*seen, strict=True), style, marker="o", label=name)
    for axis, label in ((time_axis, "CPU-ms"), (memory_axis, "peak memory, MB")):
        axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=label)
        axis.set_xticks(sorted({point.num_tokens for point in points}))
        axis.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g}k")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    time_axis.legend()
    figure.savefig(path, dpi=110)


def _measure_round(
    workers: Mapping[str, "subprocess.Popen[str]"], num_tokens: int, plan: Plan, shift: int
) -> dict[str, Finding]:
    names = [name for name in workers if num_tokens <= MOST_OF_FULL or not name.startswith("full")]
    turn = shift % len(names)
    found = {
        name: _ask(workers[name], Job(num_tokens=num_tokens, repeats=plan.repeats))
        for name in names[turn:] + names[:turn]
    }
    return {name: found[name] for name in names}


def _ask(worker: "subprocess.Popen[str]", job: Job) -> Finding:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(job.model_dump_json() + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended with status {worker.wait()}; its error stands above")
    return Finding.model_validate_json(line)


@contextmanager
def _run_worker(name: str, arguments: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "benchmarks.attention_worker", name, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
