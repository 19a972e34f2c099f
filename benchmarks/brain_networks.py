"""Cross-validation of classifiers of brain networks, cell by cell: a cell is one row, task, seed and fold.

A finished cell is a file in the work folder, so that an interrupted run goes on where it stopped.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.brain_network_rows import ROWS, TASKS, Row
from benchmarks.community_agreement import adjusted_rand, cluster_rows, normalised_mutual_information
from benchmarks.ridge import classify_with_ridge
from models.spectra import limit_spectrum
from models.thc import Thc
from training.brain_networks import BrainNetworks
from training.classification_metrics import measure_classes
from training.connectome_data import CONNECTOMES, Connectomes
from training.cross_validation import FoldResult, fit_scale, train_fold
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
        of_task = replace(RECIPE.optimizer, adamw_lr=TASKS[self.task].head_lr)
        problem = replace(RECIPE.problem, dataset=self.task, has_mixup=self.row.is_plain)
        return replace(RECIPE, problem=problem, optimizer=self.row.optimizer or of_task)

    @property
    def path(self) -> Path:
        """File name; cells with other settings have another one."""
        settings = (asdict(self.recipe.optimizer), vars(self.recipe.problem), self.row.num_steps, _name_model(self))
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
    Returns: cell → `metrics`, `train_seconds`, `inference_ms`, `num_parameters`, of models also
        `epoch_seconds`, of THC where networks are known also `communities`.
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
    make, task = cell.row.make, TASKS[cell.task]
    if make is None:
        limit = task.spectrum_limit if cell.row.has_limit else 0.0
        return asdict(measure_ridge(subjects, cell.fold, limit=limit))
    train = subjects.take(subjects.folds != cell.fold)
    per_epoch = max(1, len(train) // RECIPE.batch_size)
    recipe = replace(cell.recipe, epochs=max(1, round(cell.row.num_steps / per_epoch)), seed=cell.seed)
    if cell.row.is_plain:
        assert isinstance(recipe.problem, BrainNetworks)
        recipe = replace(recipe, problem=fit_scale(recipe.problem, train))
    model, result = train_fold(recipe, lambda: make(subjects.num_regions, task), subjects, cell.fold)
    told: dict[str, Any] = asdict(result) | {"epoch_seconds": result.train_seconds / recipe.epochs}
    if isinstance(model, Thc) and subjects.networks:
        told["communities"] = measure_communities(model, subjects, cell.fold, seed=cell.seed)
    return told


def measure_ridge(subjects: Connectomes, fold: int, *, limit: float = 0.0) -> FoldResult:
    """Fit and measure the ridge classifier; a subject's inference is counted as one product of its connections.

    Args:
        subjects: all.
        fold: that is left out.
        limit: of the spectrum of what it sees, 0 for none.
    """
    rows, columns = np.triu_indices(subjects.num_regions, 1)
    seen = limit_spectrum(subjects.connectivity, limit) if limit else subjects.connectivity
    edges = seen.numpy()[:, rows, columns].astype(np.float64)
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
def measure_communities(model: Thc, subjects: Connectomes, fold: int, *, seed: int) -> dict[str, dict[str, float]]:
    """Compare communities with the named networks, beside k-means and chance with as many parts.

    Each region belongs to the community in which test subjects have most of it, in the mean; k-means sees the rows of
    the training subjects' mean connectivity; chance deals the learned communities out anew.

    Returns: way and level → `adjusted_rand`, `mutual_information`, `num_parts`.
    """
    names = sorted(set(subjects.networks))
    networks = np.array([names.index(name) for name in subjects.networks])
    test = subjects.take(subjects.folds == fold)
    train = subjects.take(subjects.folds != fold)
    found: dict[str, dict[str, float]] = {}
    shares: torch.Tensor | None = None
    rows = train.connectivity.mean(dim=0).numpy().astype(np.float64)
    rng = np.random.default_rng(seed)
    for level, assignment in enumerate(model(test.connectivity).assignments, 1):
        shares = assignment if shares is None else shares @ assignment
        learned = shares.mean(dim=0).argmax(dim=1).numpy()
        ways = {
            "learned": learned,
            "k-means": cluster_rows(rows, len(np.unique(learned)), seed=seed),
            "chance": rng.permutation(learned),
        }
        for way, parts in ways.items():
            found[f"{way}, level {level}"] = {
                "adjusted_rand": adjusted_rand(parts, networks),
                "mutual_information": normalised_mutual_information(parts, networks),
                "num_parts": float(len(np.unique(parts))),
            }
    return found


def _name_model(cell: Cell) -> str:
    """What tells a model from another of the same row: its printed layers, at one size."""
    task = TASKS[cell.task]
    if cell.row.make is None:
        return f"ridge {task.spectrum_limit if cell.row.has_limit else 0.0}"
    with torch.device("meta"):
        model = cell.row.make(116, task)
    return f"{getattr(model, 'config', '')}{model}"
