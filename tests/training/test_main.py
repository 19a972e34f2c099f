import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from export.source import read_source
from models import BUILDERS
from training import __main__ as command
from training.__main__ import round_to_half, save_half
from training.optimizers import OptimizerConfig
from training.recipe import Recipe
from training.recipes import RECIPES


@pytest.fixture
def arguments(recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(RECIPES, recipe.name, recipe)
    return ["training", recipe.name, "--data", str(data), "--work", str(tmp_path), "--device", "cpu"]


def test_a_run_leaves_the_weights_that_its_quality_was_measured_with(
    recipe: Recipe, data: Path, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    work = tmp_path / recipe.name
    assert {path.name for path in work.iterdir()} == {"weights.safetensors", "run.json", "log.jsonl"}
    weights = load_file(work / "weights.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    quality = json.loads((work / "run.json").read_text())["quality"]
    assert quality.keys() == {"valid", "test_dev"}
    model = BUILDERS["tiny"](num_classes=2).eval()
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    for split in ("valid", "test_dev"):
        assert recipe.problem.evaluate(model, data, split) == quality[split]


def test_an_export_reads_what_a_run_leaves(
    recipe: Recipe, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    source, model = read_source(tmp_path / recipe.name)
    assert (source.name, source.version, source.default) == (recipe.name, "0.1.0", False)
    assert source.spec["labels"] == ["red", "blue"]
    assert "epochs=4" in source.origin.recipe
    assert "muon_lr=0.02" in source.origin.recipe
    assert "cutout=3" in source.origin.recipe
    stored = load_file(tmp_path / recipe.name / "weights.safetensors")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, stored[name].float(), atol=0, rtol=0)


def test_a_folder_that_is_no_bundle_is_refused_as_a_start(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [*arguments, "--from", str(tmp_path)])
    with pytest.raises(ValueError, match=str(tmp_path)):
        command.main()


def test_a_run_that_starts_from_another_says_so(
    recipe: Recipe, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    first = tmp_path / recipe.name
    second = replace(recipe, name="second", epochs=1, optimizer=OptimizerConfig(muon_lr=0.0, adamw_lr=0.0))
    monkeypatch.setitem(RECIPES, "second", second)
    monkeypatch.setattr("sys.argv", ["training", "second", *arguments[2:], "--from", str(first)])
    command.main()
    origin = read_source(tmp_path / "second")[0].origin
    assert origin.command == f"python -m training second --from {first}"
    assert "epochs=1" in origin.recipe
    assert f"Started from {recipe.name} 0.1.0" in origin.recipe
    assert "epochs=4" in origin.recipe
    stored = load_file(first / "weights.safetensors")
    for name, weight in load_file(tmp_path / "second" / "weights.safetensors").items():
        torch.testing.assert_close(weight, stored[name], atol=0, rtol=0)  # rates of 0 leave the weights alone


def test_a_finished_run_is_measured_again_by_the_recipe_as_it_is_now(
    recipe: Recipe, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    work = tmp_path / recipe.name
    before, weights = json.loads((work / "run.json").read_text()), (work / "weights.safetensors").read_bytes()
    changed = replace(recipe, epochs=99, facts=replace(recipe.facts, version="0.2.0"))
    monkeypatch.setitem(RECIPES, recipe.name, changed)
    monkeypatch.setattr("sys.argv", [*arguments, "--measure"])
    command.main()
    after = json.loads((work / "run.json").read_text())
    assert after["version"] == "0.2.0"
    assert after["quality"] == before["quality"]
    assert after["origin"] == before["origin"]
    assert (work / "weights.safetensors").read_bytes() == weights


def test_rounded_weights_stand_in_the_file_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 8, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_to_half(model)
    save_half(model, tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(stored[name].to(tensor.dtype), tensor, atol=0, rtol=0)
        torch.testing.assert_close(tensor, before[name], atol=1e-7, rtol=2**-11)  # half of float16's spacing
    assert stored["1.num_batches_tracked"].dtype == torch.int64


def test_a_weight_beyond_half_precision_is_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, 1e5)
    with pytest.raises(ValueError, match="bias"):
        round_to_half(model)
