from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models import BUILDERS
from tests.training.tone_corpus import say
from training.loop import Run
from training.recipes.ctc_transformer_micro_fsdd import RECIPE
from training.speech_recognition import SpeechRecognition

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TONES = {digit: 300.0 * 1.25**number for number, digit in enumerate(DIGITS)}
PROBLEM = RECIPE.problem
assert isinstance(PROBLEM, SpeechRecognition)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every digit as a tone, in as many takes as the recipe keeps for choices and as many for training."""
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    rows = [(digit, take) for take in range(5, 15) for digit in DIGITS]
    audio = [say(digit, rng, TONES) for digit, _ in rows]
    table = pa.table({"audio": audio, "text": [digit for digit, _ in rows], "index": [take for _, take in rows]})
    path = folder / PROBLEM.train_file
    path.parent.mkdir()
    pq.write_table(table, path)
    return folder


def test_a_few_steps_bring_the_loss_down(digits: Path) -> None:
    recipe = replace(RECIPE, epochs=40)
    run = Run(recipe, PROBLEM.load(digits), device=torch.device("cpu"))
    assert run.steps_per_epoch == 1
    losses = [float(run.advance()) for _ in range(run.num_steps)]
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_takes_kept_for_choices_are_not_trained_on(digits: Path) -> None:
    train, valid = PROBLEM.load(digits), PROBLEM.read(digits, "valid")
    assert (len(train), len(valid)) == (50, 50)
    of_train, of_valid = ({tuple(features[-1].flatten().tolist()) for features in x.features} for x in (train, valid))
    assert not of_train & of_valid


def test_every_digit_can_be_written_and_no_label_is_left_over() -> None:
    assert set(PROBLEM.labels) == {"", " ", *"".join(DIGITS)}


def test_the_real_data_are_split_as_the_recipe_says(shared_file: Callable[[str], Path]) -> None:
    folder = shared_file("data/speech_recognition").parent
    sizes = {split: len(PROBLEM.read(folder, split)) for split in ("train", "valid", "test_dev")}
    assert sizes == {"train": 2000, "valid": 250, "test_dev": 250}


@torch.no_grad()
def test_long_digit_strings_are_clustered_and_single_digits_are_not() -> None:
    torch.manual_seed(0)
    model = BUILDERS[RECIPE.model](num_classes=len(PROBLEM.labels)).eval()
    features = torch.randn(2, 600, PROBLEM.log_mel.num_mels)
    _, clusters = model(features, torch.tensor([600, 40]))
    for layer in clusters:
        assert (layer[0] >= 0).all()
        assert layer[0].unique().numel() > 1
        assert (layer[1, :, :20] < 0).all()
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
