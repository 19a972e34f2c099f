import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from export.source import RUN, WEIGHTS, read_source
from service.errors import BundleError
from tests.export.conftest import make_model, make_source


@pytest.fixture
def run_copy(run_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run_folder, tmp_path / "run")


def test_a_run_gives_its_facts_and_its_weights_in_float32(run_folder: Path) -> None:
    source, model = read_source(run_folder)
    assert source == make_source()
    assert not model.training
    expected = make_model().state_dict()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[name]), name


def test_a_bundle_gives_the_same_as_the_run_it_was_made_of(run_folder: Path, bundle_folder: Path) -> None:
    (source, model), (other, again) = read_source(run_folder), read_source(bundle_folder)
    told_by_the_plan = other.spec.keys() - source.spec.keys()
    assert told_by_the_plan == {"explanation"}
    kept = {name: value for name, value in other.spec.items() if name not in told_by_the_plan}
    assert source == other.model_copy(update={"spec": kept})
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_folder_that_is_neither_is_refused_with_both_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither run\.json nor manifest\.json"):
        read_source(tmp_path)


def test_a_fact_that_is_no_field_is_refused(run_copy: Path) -> None:
    (run_copy / RUN).write_text(json.dumps(make_source().model_dump(mode="json") | {"luck": 1}))
    with pytest.raises(ValidationError, match="luck"):
        read_source(run_copy)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_refused(run_copy: Path, change: str) -> None:
    weights = load_file(run_copy / WEIGHTS)
    if change == "missing":
        del weights["head.bias"]
    else:
        weights["stray"] = torch.zeros(1)
    save_file(weights, run_copy / WEIGHTS)
    with pytest.raises(RuntimeError, match="head.bias" if change == "missing" else "stray"):
        read_source(run_copy)


def test_a_damaged_bundle_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_folder, tmp_path / "copy")
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleError, match=WEIGHTS):
        read_source(copy)
