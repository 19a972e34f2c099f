"""Cross-validation of classifiers of brain networks, cell by cell: a cell is one row, task, seed and fold.

A finished cell is a file in the work folder, so that an interrupted run goes on where it stopped.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.brain_network_rows import ROWS, TASKS, Row
from benchmarks.community_agreement import adjusted_rand, cluster_rows, normalised_mutual_information
from benchmarks.ridge import classify_with_ridge
from models.thc import Thc
from training.brain_networks import BrainNetworks
from training.classification_metrics import measure_classes
from training.connectome_data import CONNECTOMES, Connectomes
from training.cross_validation import FoldResult, train_fold
from training.recipe import Recipe
from training.recipes.thc_aal116_abide import RECIPE

FOLDS = range(5)


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Attributes:
        row: what.
        task: on which subjects and labels.
        seed, fold: of the training, and left out of it.
    """

    row: Row
    task: str
    seed: int
    fold: int

    @property
    def recipe(self) -> Recipe:
        """The shipped recipe with the optimiser of row and task; epochs follow from the number of subjects."""
        assert isinstance(RECIPE.problem, BrainNetworks)
        of_task = replace(RECIPE.optimizer, adamw_lr=TASKS[self.task].linear_lr)
        problem = replace(RECIPE.problem, dataset=self.task)
        return replace(RECIPE, problem=problem, optimizer=self.row.optimizer or of_task)

    @property
    def path(self) -> Path:
        """File name; cells with other settings have another one."""
        settings = (asdict(self.recipe.optimizer), vars(self.recipe.problem), self.row.num_steps, _name_model(self.row))
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
        return Path(f"{self.task}_{self.row.key}_{self.seed}_{self.fold}_{digest}.json")


def list_cells(rows: Sequence[str] = (), tasks: Sequence[str] = ()) -> list[Cell]:
    """All cells of some rows and tasks, by default of all, the first seed of everything before the second of anything.

    Raises: ValueError naming a row or task that does not exist.
    """
    for wanted, known in ((rows, [row.key for row in ROWS]), (tasks, list(TASKS))):
        if strays := set(wanted) - set(known):
            raise ValueError(f"{', '.join(sorted(strays))} is not known; one of {', '.join(known)} was expected")
    cells = [
        Cell(row, task, seed, fold)
        for row in ROWS
        for task in row.tasks
        for seed in range(1, row.num_seeds + 1)
        for fold in FOLDS
        if (not rows or row.key in rows) and (not tasks or task in tasks)
    ]
    return sorted(cells, key=lambda cell: cell.seed)


def measure_cells(cells: Sequence[Cell], *, data: Path, work: Path) -> dict[Cell, dict[str, Any]]:
    """Measure what was not measured before, on one thread.

    Args:
        cells: in this order.
        data: folder of all data sets.
        work: folder of finished cells.
    Returns: cell → `metrics`, `train_seconds`, `inference_ms`, `num_parameters`, of THC where networks are known also
        `communities`.
    """
    work.mkdir(parents=True, exist_ok=True)
    subjects: dict[str, Connectomes] = {}
    found = {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, cell in enumerate(cells, 1):
            path = work / cell.path
            if not path.exists():
                if cell.task not in subjects:
                    subjects[cell.task] = CONNECTOMES[cell.task](data)
                start = time.process_time()
                result = measure_cell(cell, subjects[cell.task])
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(result))
                partial.replace(path)
                spent = time.process_time() - start
                told = ", ".join(f"{name} {value:.3f}" for name, value in result["metrics"].items())
                print(f"{number}/{len(cells)} {path.stem}: {told}; {spent:.0f} s of CPU", flush=True)
            found[cell] = json.loads(path.read_text())
    finally:
        torch.set_num_threads(num_threads)
    return found


def measure_cell(cell: Cell, subjects: Connectomes) -> dict[str, Any]:
    """Train and measure one cell."""
    if cell.row.make is None:
        return asdict(measure_ridge(subjects, cell.fold))
    num_train = int((subjects.folds != cell.fold).sum())
    per_epoch = max(1, num_train // RECIPE.batch_size)
    recipe = replace(cell.recipe, epochs=max(1, round(cell.row.num_steps / per_epoch)), seed=cell.seed)
    model, result = train_fold(recipe, _bind(cell, subjects), subjects, cell.fold)
    told: dict[str, Any] = asdict(result)
    if isinstance(model, Thc) and subjects.networks:
        told["communities"] = measure_communities(recipe, model, subjects, cell.fold)
    return told


def measure_ridge(subjects: Connectomes, fold: int) -> FoldResult:
    """Fit and measure the ridge classifier; a subject's inference is counted as one product of its connections."""
    rows, columns = np.triu_indices(subjects.num_regions, 1)
    edges = subjects.connectivity.numpy()[:, rows, columns].astype(np.float64)
    labels, folds = subjects.labels.numpy(), subjects.folds.numpy()
    is_test = folds == fold
    start = time.process_time()
    scores = classify_with_ridge(edges[~is_test], labels[~is_test], folds[~is_test], edges[is_test])
    seconds = time.process_time() - start
    weights = np.zeros((edges.shape[1], scores.shape[1]))
    start = time.process_time()
    for edge in edges[:100]:
        edge @ weights
    milliseconds = 10 * (time.process_time() - start)  # of 100 subjects, in ms for one
    metrics = measure_classes(torch.from_numpy(scores), subjects.labels[subjects.folds == fold])
    return FoldResult(metrics, seconds, milliseconds, weights.size + scores.shape[1])


@torch.inference_mode()
def measure_communities(recipe: Recipe, model: Thc, subjects: Connectomes, fold: int) -> dict[str, dict[str, float]]:
    """Compare communities with the named networks, beside k-means and chance with as many parts.

    Each region belongs to the community in which test subjects have most of it, in the mean; k-means sees the rows of
    the training subjects' mean connectivity; chance deals the learned communities out anew.

    Returns: way and level → `adjusted_rand`, `mutual_information`, `num_parts`.
    """
    assert isinstance(recipe.problem, BrainNetworks)
    names = sorted(set(subjects.networks))
    networks = np.array([names.index(name) for name in subjects.networks])
    test = subjects.take(subjects.folds == fold)
    train = subjects.take(subjects.folds != fold)
    # The scale of training, so that the model sees what it knows.
    scaled = (test.connectivity - train.connectivity.mean()) / train.connectivity.var(dim=0).mean().sqrt()
    found: dict[str, dict[str, float]] = {}
    shares: torch.Tensor | None = None
    rows = train.connectivity.mean(dim=0).numpy().astype(np.float64)
    rng = np.random.default_rng(recipe.seed)
    for level, assignment in enumerate(model(scaled).assignments, 1):
        shares = assignment if shares is None else shares @ assignment
        learned = shares.mean(dim=0).argmax(dim=1).numpy()
        ways = {
            "learned": learned,
            "k-means": cluster_rows(rows, len(np.unique(learned)), seed=recipe.seed),
            "chance": rng.permutation(learned),
        }
        for way, parts in ways.items():
            found[f"{way}, level {level}"] = {
                "adjusted_rand": adjusted_rand(parts, networks),
                "mutual_information": normalised_mutual_information(parts, networks),
                "num_parts": float(len(np.unique(parts))),
            }
    return found


def _bind(cell: Cell, subjects: Connectomes) -> Callable[[], nn.Module]:
    make = cell.row.make
    assert make is not None
    return lambda: make(subjects.num_regions, TASKS[cell.task].num_classes)


def _name_model(row: Row) -> str:
    """What tells a model from another of the same row: its printed layers, at a small size."""
    if row.make is None:
        return "ridge"
    with torch.device("meta"):
        model = row.make(116, 2)
    return f"{getattr(model, 'config', '')}{model}"
