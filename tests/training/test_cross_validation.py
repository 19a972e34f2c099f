from dataclasses import replace

import pytest
import torch
from torch import nn

from models.thc import Thc
from models.thc_config import ThcConfig
from tests.training.tiny_connectomes import N, R, write_connectomes
from training.brain_networks import BrainNetworks
from training.connectome_data import Connectomes, read_abide_diagnosis
from training.cross_validation import fit_scale, train_fold
from training.recipes.thc_aal116_abide import RECIPE

CONFIG = ThcConfig(
    num_regions=R,
    sizes=(6, 3),
    num_heads=2,
    hidden_dim=12,
    assignment="ocread",
    encoder="none",
    readout="linear",
    spectrum_limit=2.0,
    is_standardised=True,
    resolutions=(2.0, 1.0),
    has_linear_path=True,
)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Connectomes:
    data = tmp_path_factory.mktemp("connectomes")
    write_connectomes(data)
    return read_abide_diagnosis(data)


def make_model() -> nn.Module:
    return Thc(CONFIG, num_classes=2)


def test_a_class_that_anyone_can_tell_is_learned_and_a_run_can_be_repeated(subjects: Connectomes) -> None:
    recipe = replace(RECIPE, epochs=8, batch_size=8, optimizer=replace(RECIPE.optimizer, adamw_lr=5e-2, muon_lr=1e-2))
    model, found = train_fold(recipe, make_model, subjects, 2)
    assert found.metrics["auroc"] > 0.95
    assert not model.training
    assert found.num_parameters == sum(parameter.numel() for parameter in make_model().parameters())
    assert train_fold(recipe, make_model, subjects, 2)[1].metrics == found.metrics


def test_the_test_fold_takes_no_part_in_the_training(subjects: Connectomes) -> None:
    recipe = replace(RECIPE, epochs=1, batch_size=16)
    is_test = subjects.folds == 1
    changed = Connectomes(
        torch.where(is_test[:, None, None], 1 - subjects.connectivity, subjects.connectivity),
        torch.where(is_test, 1 - subjects.labels, subjects.labels),
        subjects.folds,
    )
    weights = [dict(train_fold(recipe, make_model, part, 1)[0].named_parameters()) for part in (subjects, changed)]
    for name, weight in weights[0].items():
        assert weight.equal(weights[1][name]), name


def test_the_scale_is_that_of_the_differences_between_training_subjects(subjects: Connectomes) -> None:
    assert isinstance(RECIPE.problem, BrainNetworks)
    problem = fit_scale(RECIPE.problem, subjects)
    scaled = problem.normalise(subjects.connectivity)
    assert len(scaled) == N
    torch.testing.assert_close(scaled.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.var(dim=0).mean(), torch.tensor(1.0), atol=1e-5, rtol=0)
