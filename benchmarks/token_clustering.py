"""TCFormer: its program beside its module and beside an exchange that scatters; the first version beside the second.

Speed is of `tcformer-light` at 224 pixels; contestants take turns, in one process with one thread. Versions are
compared with the neck and the Semantic-FPN head, each in a process of its own.
"""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.bundles import IMAGENET
from benchmarks.figures import median_ratio
from benchmarks.macs import count_macs
from benchmarks.picture_worker import PictureFinding
from benchmarks.scattered_exchange import with_scattered_exchange
from export.onnx_program import export_onnx
from export.parity import measure_parity
from export.picture_program import plan_pictures
from export.plan import Plan as ExportPlan
from models import BUILDERS
from service.bundle import Parity
from service.runtimes.onnx import open_onnx
from service.tasks.pictures import PictureSpec

CLASSIFIER, SIDE = "tcformer-light", 224
VERSIONS = ("tcformer-fpn-base", "tcformer-v2-reconstruction-fpn-base")
NUM_CLASSES = {CLASSIFIER: 1000} | dict.fromkeys(VERSIONS, 150)  # ImageNet-1k and ADE20K
BATCHES = (1, 8)
NUM_CROPS = 8
SCATTER, EAGER, PROGRAM = "eager, scattered exchange", "eager", "program"
SEED = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: of all contestants at all batch sizes.
        calls: of a contestant in a round, after one that is not counted.
        module_sides, program_sides: pixels at which versions are compared. From 512 pixels on a program has so many
            blocks of distances that exporting the first version takes long.
    """

    rounds: int = 3
    calls: int = 2
    module_sides: tuple[int, ...] = (224, 512, 1024)
    program_sides: tuple[int, ...] = (224,)


QUICK = Plan(rounds=1, calls=1, module_sides=(224,), program_sides=())


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One round of one contestant at one batch size; `cpu_seconds` of a picture, the least of its calls."""

    contestant: str
    batch: int
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class VersionFinding:
    """One model at one size; `program` is None where none was exported."""

    name: str
    side: int
    macs: int
    module: PictureFinding
    program: PictureFinding | None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """All that was measured."""

    timings: list[Timing]
    parity: Parity
    versions: list[VersionFinding]


def measure_token_clustering(folder: Path, plan: Plan) -> Finding:
    """Measure; programs are left in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    timings, parity = measure_speed(folder / f"{CLASSIFIER}.onnx", plan)
    versions = [
        _measure_version(name, side, folder, has_program=side in plan.program_sides)
        for side, name in itertools.product(plan.module_sides, VERSIONS)
    ]
    return Finding(timings=timings, parity=parity, versions=versions)


def measure_speed(path: Path, plan: Plan) -> tuple[list[Timing], Parity]:
    """Export the classifier to this path, compare it with its module, and time all contestants in turns."""
    exported = plan_random_model(CLASSIFIER, SIDE)
    export_onnx(exported, path)
    runtime = open_onnx(path, device="cpu")
    parity = measure_parity(exported, runtime)
    crops = exported.parity_batches[-1]["image"]

    def run_eager(batch: int) -> None:
        exported.run({"image": crops[:batch]})

    def run_scattered(batch: int) -> None:
        with with_scattered_exchange():
            run_eager(batch)

    def run_program(batch: int) -> None:
        runtime.run({"image": crops[:batch]}, ("logits",))

    turns = [(SCATTER, run_scattered), (EAGER, run_eager), (PROGRAM, run_program)]
    timings = [
        Timing(contestant=name, batch=batch, cpu_seconds=_time(run, batch, plan.calls))
        for index, batch in itertools.product(range(plan.rounds), BATCHES)
        for name, run in (turns if index % 2 == 0 else turns[::-1])
    ]
    runtime.close()
    return timings, parity


def plan_random_model(name: str, side: int) -> ExportPlan:
    """Plan the program of a model with random weights, all of which matter, for squares of this side."""
    torch.manual_seed(SEED)
    model = BUILDERS[name](num_classes=NUM_CLASSES[name]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.trunc_normal_(weight, std=0.02)  # residual branches start at zero, and zeros prove nothing
    framing = PictureSpec(
        height=side, width=side, resize_shorter_side=side, interpolation="bicubic", max_pixels=10_000_000
    )
    return plan_pictures(model, IMAGENET, framing, spec={}, num_crops=NUM_CROPS)


def _time(run: Callable[[int], None], batch: int, calls: int) -> float:
    run(batch)
    times = []
    for _ in range(calls):
        start = time.process_time()
        run(batch)
        times.append(time.process_time() - start)
    return min(times) / batch


def _measure_version(name: str, side: int, folder: Path, *, has_program: bool) -> VersionFinding:
    program = None
    if has_program:
        path = folder / f"{name}-{side}.onnx"
        export_onnx(plan_random_model(name, side), path)
        program = _ask(name, side, path)
    with torch.device("meta"):
        model = BUILDERS[name](num_classes=NUM_CLASSES[name])
    macs = count_macs(model, rows=side, columns=side).total()
    return VersionFinding(name=name, side=side, macs=macs, module=_ask(name, side), program=program)


def _ask(name: str, side: int, *path: Path) -> PictureFinding:
    command = [sys.executable, "-m", "benchmarks.picture_worker", name, str(side), *map(str, path)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return PictureFinding.model_validate_json(answer)


def render_token_clustering(found: Finding) -> str:
    """Render as Markdown."""
    return f"""## Speed

`{CLASSIFIER}`, random weights, {SIDE} pixels, one thread, {found.parity.inputs}. CPU-ms a picture, median over rounds \
of the least of a round; ratios are taken within a round.

{_render_speed(found.timings)}

Difference between program and module, at batches of {found.parity.batch_sizes}:

| output | max abs difference / max abs | share of rows that differ by more than 1e-5 |
|---|---|---|
{_render_parity(found.parity)}

## First version and reconstruction of the second

Segmenters with a Semantic-FPN head, random weights, one picture, one thread; peak memory beyond the weights.

{_render_versions(found.versions)}"""


def _render_speed(timings: Sequence[Timing]) -> str:
    lines = [f"| batch | contestant | CPU-ms | {SCATTER} ÷ this | by round |", "|---|---|---|---|---|"]
    for batch, contestant in itertools.product(BATCHES, (SCATTER, EAGER, PROGRAM)):
        cpu, scattered = (
            [timing.cpu_seconds for timing in timings if (timing.contestant, timing.batch) == (name, batch)]
            for name in (contestant, SCATTER)
        )
        rounds = ", ".join(f"{seconds * 1e3:.0f}" for seconds in cpu)
        lines.append(
            f"| {batch} | {contestant} | {median(cpu) * 1e3:.0f} | {median_ratio(scattered, cpu):.2f} | {rounds} |"
        )
    return "\n".join(lines)


def _render_parity(parity: Parity) -> str:
    return "\n".join(
        f"| {name} | {error:.2e} | {parity.share_of_rows_off.get(name, 0.0):.2%} |"
        for name, error in parity.max_relative_error.items()
    )


def _render_versions(versions: Sequence[VersionFinding]) -> str:
    lines = [
        "| model | pixels | GMAC | module CPU-ms | module peak MB | program CPU-ms | program peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for version in versions:
        cells = [_render_cells(version.module), "— | —" if version.program is None else _render_cells(version.program)]
        lines.append(f"| {version.name} | {version.side} | {version.macs / 1e9:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _render_cells(found: PictureFinding) -> str:
    return f"{found.cpu_seconds * 1e3:.0f} | {found.peak_bytes / 1e6:.0f}"
