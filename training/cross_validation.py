"""Cross-validation of classifiers of brain networks on the folds that come with the data.

Nothing is chosen here: a fold is trained for as many epochs as the recipe says and measured once, at the end.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from training.brain_networks import BrainNetworks
from training.classification_metrics import measure_classes
from training.connectome_data import Connectomes
from training.loop import Run
from training.recipe import Recipe

TIMED_CALLS = 15


@dataclass(frozen=True)
class FoldResult:
    """What was measured of one fold.

    Attributes:
        metrics: of the test fold, as `measure_classes` gives them.
        train_seconds: CPU time of the training.
        inference_ms: CPU time of one subject by itself, median.
        num_parameters: of the model.
    """

    metrics: dict[str, float]
    train_seconds: float
    inference_ms: float
    num_parameters: int


def train_fold(
    recipe: Recipe, make_model: Callable[[], nn.Module], subjects: Connectomes, fold: int
) -> tuple[nn.Module, FoldResult]:
    """Train on all folds but one, and measure that one.

    Args:
        recipe: its problem is `BrainNetworks`.
        make_model: called once, after chance was seeded with the recipe's seed.
        subjects: all.
        fold: that is left out.
    Returns: the averaged model, in evaluation mode, and what was measured.
    Raises: ValueError if there are too few subjects for one batch.
    """
    assert isinstance(recipe.problem, BrainNetworks)
    train, test = subjects.take(subjects.folds != fold), subjects.take(subjects.folds == fold)
    problem = recipe.problem
    torch.manual_seed(recipe.seed)
    start = time.process_time()
    run = Run(recipe, train, device=torch.device("cpu"), model=make_model())
    while run.step < run.num_steps:
        run.advance()
    model = run.finish()
    seconds = time.process_time() - start
    result = FoldResult(
        metrics=measure_classes(problem.classify(model, test), test.labels),
        train_seconds=seconds,
        inference_ms=time_inference(problem, model, test),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    return model, result


def fit_scale(problem: BrainNetworks, train: Connectomes) -> BrainNetworks:
    """Take mean and scale from the training subjects: the spread of a connection among subjects becomes about 1."""
    spread = train.connectivity.var(dim=0).mean().sqrt().item()
    return replace(problem, mean=train.connectivity.mean().item(), std=spread)


@torch.inference_mode()
def time_inference(problem: BrainNetworks, model: nn.Module, subjects: Connectomes) -> float:
    """Median CPU time of one subject by itself, in ms."""
    times = []
    for row in range(TIMED_CALLS):
        x = problem.normalise(subjects.connectivity[row % len(subjects)][None])
        start = time.process_time()
        model(x)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)
