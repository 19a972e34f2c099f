"""What THC costs at the published size, 200 regions: the published layout beside ours, each in a process of its own.

Connectivities and labels are of chance: costs do not depend on them, and no data set has 200 regions and a diagnosis.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.brain_network_rows import ROWS, TASKS
from benchmarks.brain_networks import Cell
from training.connectome_data import Connectomes
from training.cross_validation import train_fold

NUM_REGIONS = 200
KEYS = ("thc-official", "thc")  # of rows
NUM_STEPS = 4  # timed, in batches as in the tables
TASK = "abide-diagnosis"  # whose number of classes and settings the models have
NUM_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model costs.

    Attributes:
        num_parameters: of the model.
        step_seconds: CPU time of a step of the training.
        inference_ms: CPU time of one subject by itself, median.
        peak_mb: most memory resident in the process while it trains, with Python and torch.
    """

    num_parameters: int
    step_seconds: float
    inference_ms: float
    peak_mb: float


def measure_costs(keys: Sequence[str] = KEYS, *, num_regions: int = NUM_REGIONS) -> dict[str, Cost]:
    """Measure some rows, one after the other: title → cost."""
    costs = {}
    for key in keys:
        # A fresh process for each, as a peak holds what came before it.
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            costs[_find(key).row.title] = pool.submit(measure_cost, key, num_regions).result()
    return costs


def measure_cost(key: str, num_regions: int) -> Cost:
    """Measure a row at another number of regions, on one thread."""
    torch.set_num_threads(1)
    cell = _find(key)
    recipe = replace(cell.recipe, epochs=1)
    subjects = make_subjects(NUM_STEPS * recipe.batch_size * NUM_FOLDS // (NUM_FOLDS - 1), num_regions)
    from_row = cell.row.make
    assert from_row is not None, "the ridge classifier has no layout"
    _, found = train_fold(recipe, lambda: from_row(num_regions, TASKS[TASK]), subjects, fold=0)
    return Cost(
        num_parameters=found.num_parameters,
        step_seconds=found.train_seconds / NUM_STEPS,
        inference_ms=found.inference_ms,
        peak_mb=read_peak_mb(),
    )


def make_subjects(number: int, num_regions: int) -> Connectomes:
    """Make symmetric matrices of chance, within ±1, in as many folds as the tables have, and labels in turns."""
    noise = torch.rand(number, num_regions, num_regions, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(number)
    return Connectomes((noise + noise.transpose(1, 2)) - 1, numbers // NUM_FOLDS % 2, numbers % NUM_FOLDS)


def read_peak_mb() -> float:
    """Most memory that was resident in this process, in MB, with Python and torch."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def render_costs(costs: Mapping[str, Cost]) -> str:
    """Write a table as Markdown."""
    lines = [
        f"## Cost at {NUM_REGIONS} regions, the published size",
        "",
        f"Connectivities of chance; {NUM_STEPS} steps of training, one thread, a process for each.",
        "",
        "| model | parameters | s per step | inference ms | peak MB |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {title} | {cost.num_parameters:,} | {cost.step_seconds:.2f} | {cost.inference_ms:.1f} | "
            f"{cost.peak_mb:.0f} |"
            for title, cost in costs.items()
        ),
    ]
    return "\n".join(lines)


def _find(key: str) -> Cell:
    return Cell(next(row for row in ROWS if row.key == key), TASK, seed=1, fold=0)
