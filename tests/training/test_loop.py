import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from models import BUILDERS
from training import loop
from training.__main__ import round_to_half, save_half
from training.image_classification import ImageClassification
from training.loop import CHECKPOINT, Trained, train
from training.recipe import Recipe

CPU = torch.device("cpu")


class Interruption(Exception):
    pass


def run(recipe: Recipe, data: Path, work: Path, **arguments: Any) -> Trained:
    return train(recipe, data=data, work=work, **{"device": CPU, **arguments})


def lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)


def spoil(monkeypatch: pytest.MonkeyPatch, *, call: int, by: BaseException | float) -> None:
    """Let the loss of one call be raised, or be a number."""
    loss, calls = ImageClassification.loss, []

    def spoiled(self: ImageClassification, *arguments: Any, progress: float, rng: Generator) -> Tensor:
        calls.append(progress)
        if len(calls) != call:
            return loss(self, *arguments, progress=progress, rng=rng)
        if isinstance(by, BaseException):
            raise by
        return loss(self, *arguments, progress=progress, rng=rng) * by

    monkeypatch.setattr(ImageClassification, "loss", spoiled)


@pytest.fixture
def interrupted(recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a run that was interrupted after five of its eight steps, each of them saved."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
        spoil(patch, call=6, by=Interruption())
        with pytest.raises(Interruption):
            run(recipe, data, tmp_path / "interrupted")
    return tmp_path / "interrupted"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_loss_falls(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(loop, "LOG_STEPS", 4)
    model, _ = run(replace(recipe, epochs=12), data, tmp_path, device=torch.device(device))
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert recipe.problem.evaluate(model, data, "test_dev")["accuracy"] == 1.0


def test_two_runs_of_one_seed_give_the_same_weights_and_another_seed_others(
    recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    model, _ = run(recipe, data, tmp_path / "a")
    assert_same_weights(run(recipe, data, tmp_path / "b").model, model)
    other, _ = run(replace(recipe, seed=2), data, tmp_path / "c")
    assert other.state_dict()["head.weight"].ne(model.state_dict()["head.weight"]).any()


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    recipe: Recipe, data: Path, tmp_path: Path, interrupted: Path
) -> None:
    whole, _ = run(recipe, data, tmp_path / "whole")
    resumed, _ = run(recipe, data, interrupted)
    assert_same_weights(resumed, whole)
    assert [line["step"] for line in lines(interrupted) if "num_steps" in line] == [0, 5]


def test_a_resumed_run_reports_the_seconds_of_all_its_parts(recipe: Recipe, data: Path, interrupted: Path) -> None:
    state = torch.load(interrupted / CHECKPOINT, weights_only=True)
    assert 0.0 < state["seconds"] < 60.0
    torch.save(state | {"seconds": 1000.0}, interrupted / CHECKPOINT)
    assert 1000.0 < run(recipe, data, interrupted).seconds < 1060.0


def test_a_checkpoint_that_names_neither_seconds_nor_length_is_resumed(
    recipe: Recipe, data: Path, interrupted: Path
) -> None:
    state = torch.load(interrupted / CHECKPOINT, weights_only=True)
    for name in ("seconds", "num_steps", "cuda_rng"):
        del state[name]
    torch.save(state, interrupted / CHECKPOINT)
    assert 0.0 < run(recipe, data, interrupted).seconds < 60.0


def test_a_checkpoint_of_a_run_of_another_length_is_refused(recipe: Recipe, data: Path, interrupted: Path) -> None:
    with pytest.raises(ValueError, match="8 steps; this one has 10"):
        run(replace(recipe, epochs=5), data, interrupted)


def test_a_finished_run_is_not_trained_again(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = run(recipe, data, tmp_path)
    spoil(monkeypatch, call=1, by=Interruption())
    assert_same_weights(run(recipe, data, tmp_path).model, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before_it(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    spoil(monkeypatch, call=4, by=value)
    with pytest.raises(FloatingPointError, match=rf"{value} at step 4"):
        run(recipe, data, tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 3
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_the_weights_that_a_run_gives_are_the_averaged_ones(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    model, _ = run(recipe, data, tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    averaged = {name.removeprefix("module."): w for name, w in state["average"].items() if name != "n_averaged"}
    torch.testing.assert_close(dict(model.state_dict()), averaged, atol=0, rtol=0)
    assert model.state_dict()["head.weight"].ne(state["model"]["head.weight"]).any()
    assert not model.training


def test_a_run_starts_from_the_half_precision_weights_it_is_given(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    given = BUILDERS["tiny"](num_classes=2)
    round_to_half(given)
    save_half(given, tmp_path / "weights.safetensors")
    started = loop.Run(recipe, recipe.problem.load(data), device=CPU, start_weights=tmp_path / "weights.safetensors")
    assert_same_weights(started.model, given)
    assert_same_weights(started.average.module, given)
    assert {weight.dtype for weight in started.model.state_dict().values()} == {torch.float32}


def test_weights_of_another_model_are_refused(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    save_half(BUILDERS["tiny"](num_classes=3), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"head\.weight has shape"):
        run(recipe, data, tmp_path, start_weights=tmp_path / "weights.safetensors")


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Tensor] = []
    loss = ImageClassification.loss

    def recording(self: ImageClassification, model: nn.Module, examples: Any, chosen: Tensor, **rest: Any) -> Tensor:
        rows.append(chosen)
        return loss(self, model, examples, chosen, **rest)

    monkeypatch.setattr(ImageClassification, "loss", recording)
    run(recipe, data, tmp_path)
    epochs = [tuple(torch.cat(rows[start : start + 2]).tolist()) for start in range(0, len(rows), 2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(32))] * recipe.epochs
    assert len(set(epochs)) == recipe.epochs


def test_fewer_examples_than_a_batch_are_refused(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32 examples do not fill one batch of 64"):
        run(replace(recipe, batch_size=64), data, tmp_path)
