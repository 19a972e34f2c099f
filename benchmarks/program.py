"""A bundle's ONNX program beside the eager torch module that it was made of: time and parity, one thread each."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.figures import median_ratio, percentile
from export.parity import measure_parity
from export.planners import make_plan
from export.source import read_source
from service.bundle import Parity, open_bundle
from service.runtimes.onnx import open_onnx

BATCHES = (1, 8)
EAGER, PROGRAM = "eager torch", "ONNX program"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One round of one contestant at one batch size.

    Attributes:
        wall_seconds, cpu_seconds: of each call.
    """

    contestant: str
    batch: int
    wall_seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ProgramFinding:
    """What was measured of a program.

    Attributes:
        timings: by round, contestants in turns.
        parity: how far both are apart.
    """

    timings: list[Timing]
    parity: Parity


def measure_program(folder: Path, *, rounds: int, seconds: float) -> ProgramFinding:
    """Time both on the golden inputs, in turns, and compare their outputs.

    Args:
        folder: of the bundle.
        rounds: of both contestants at all batch sizes.
        seconds: of one contestant at one batch size; before each, one call that is not counted.
    """
    torch.set_num_threads(1)
    manifest = open_bundle(folder).manifest
    plan = make_plan(*read_source(folder))
    runtime = open_onnx(folder / manifest.programs["onnx"], device="cpu")
    parity = measure_parity(plan, runtime)
    batches = {
        size: {name: np.resize(array, (size, *array.shape[1:])) for name, array in plan.golden.items()}
        for size in BATCHES
    }

    def run_eager(batch: int) -> None:
        plan.run(batches[batch])

    def run_program(batch: int) -> None:
        runtime.run(batches[batch], plan.output_names[:1])

    turns = [(EAGER, run_eager), (PROGRAM, run_program)]
    timings = [
        _time(name, run, batch, seconds)
        for index, batch in itertools.product(range(rounds), BATCHES)
        for name, run in (turns if index % 2 == 0 else turns[::-1])
    ]
    runtime.close()
    return ProgramFinding(timings=timings, parity=parity)


def render_program(found: ProgramFinding) -> str:
    """Render as Markdown."""
    lines = [
        "| batch | contestant | CPU-ms a sample | call p50 ms | call p99 ms | CPU ÷ eager | calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch in BATCHES:
        eager = _cpu_per_sample(found.timings, EAGER, batch)
        for contestant in (EAGER, PROGRAM):
            cpu = _cpu_per_sample(found.timings, contestant, batch)
            walls = [
                seconds
                for timing in found.timings
                if (timing.contestant, timing.batch) == (contestant, batch)
                for seconds in timing.wall_seconds
            ]
            lines.append(
                f"| {batch} | {contestant} | {median(cpu) * 1e3:.2f} | {median(walls) * 1e3:.2f} | "
                f"{percentile(walls, 0.99) * 1e3:.2f} | {median_ratio(cpu, eager):.3f} | {len(walls)} |"
            )
    raw = "\n".join(
        f"{timing.contestant}; batch {timing.batch}; {len(timing.cpu_seconds)} calls; CPU-ms a sample: "
        f"median {median(timing.cpu_seconds) / timing.batch * 1e3:.3f}, "
        f"p99 {percentile(timing.cpu_seconds, 0.99) / timing.batch * 1e3:.3f}"
        for timing in found.timings
    )
    parity = found.parity
    errors = "\n".join(
        f"| {name} | {error:.2e} | {parity.share_of_rows_off.get(name, 0.0):.2%} |"
        for name, error in parity.max_relative_error.items()
    )
    return (
        "\n".join(lines)
        + f"""

Difference between both, over {parity.inputs}, in batches of {parity.batch_sizes}:

| output | max abs difference / max abs | share of rows that differ by more than 1e-5 |
|---|---|---|
{errors}

Raw numbers, by round:

```
{raw}
```"""
    )


def _cpu_per_sample(timings: Sequence[Timing], contestant: str, batch: int) -> list[float]:
    return [
        median(timing.cpu_seconds) / batch
        for timing in timings
        if (timing.contestant, timing.batch) == (contestant, batch)
    ]


def _time(contestant: str, run: Callable[[int], None], batch: int, seconds: float) -> Timing:
    run(batch)
    walls: list[float] = []
    cpus: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        cpu = time.process_time()
        run(batch)
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - start)
    return Timing(contestant=contestant, batch=batch, wall_seconds=tuple(walls), cpu_seconds=tuple(cpus))
