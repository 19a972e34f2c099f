import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from export import bundles
from export.bundles import CARD, GOLDEN, PROGRAM, save_weights, write_bundle
from export.model_card import render_model_card
from export.parity import MAX_SHARE_OFF_FP16
from export.plan import Plan
from export.planners import make_plan
from export.source import WEIGHTS, Source, read_source
from service.bundle import MANIFEST, Parity, open_bundle
from service.metrics import Metrics
from service.opening import open_endpoint
from service.settings import Settings
from tests.export.conftest import make_model, quiet_exporter

PARITY = Parity(inputs="none", batch_sizes=(1,), max_relative_error={})

ReadSource = Callable[[], tuple[Source, nn.Module]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def _quick_export(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the program of the session's bundle for the result of the slow step."""

    def copy(plan: Plan, path: Path, *, weights: Path) -> None:
        shutil.copy(bundle_folder / PROGRAM, path)

    monkeypatch.setattr(bundles, "export_onnx", copy)


def test_a_bundle_holds_all_its_parts(bundle_folder: Path) -> None:
    manifest = open_bundle(bundle_folder).manifest
    assert set(manifest.files) == {PROGRAM, GOLDEN, WEIGHTS, CARD}
    assert [(t.name, t.dtype, t.shape) for t in manifest.inputs] == [("image", "uint8", ("batch", 16, 16, 3))]
    assert [(t.name, t.shape) for t in manifest.outputs] == [
        ("logits", ("batch", 5)),
        ("clusters_stage1", ("batch", 5, 64)),
        ("evidence", ("batch", 5, 4, 4)),
    ]
    assert set(manifest.parity.max_relative_error) == {"logits", "clusters_stage1", "evidence"}
    assert (bundle_folder / CARD).read_text() == render_model_card(manifest)


def test_the_service_takes_the_bundle(bundle_folder: Path, tmp_path: Path) -> None:
    settings = Settings(cache=tmp_path, device="cpu")
    with ThreadPoolExecutor(1) as pool:
        endpoint = open_endpoint(open_bundle(bundle_folder), settings, Metrics(), pool)
    assert endpoint.manifest.name == "paca-vit-of-tests"
    endpoint.runtime.close()


def test_a_bundle_can_be_made_again_from_itself(bundle_folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    with quiet_exporter():
        manifest = write_bundle(*read_source(bundle_folder), again)
    old, new = open_bundle(bundle_folder).manifest, open_bundle(again).manifest
    assert new == manifest
    assert new.model_dump(exclude={"files"}) == old.model_dump(exclude={"files"})
    assert (again / WEIGHTS).read_bytes() == (bundle_folder / WEIGHTS).read_bytes()
    with np.load(again / GOLDEN) as found, np.load(bundle_folder / GOLDEN) as expected:
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], strict=True)


@pytest.mark.usefixtures("_quick_export")
@pytest.mark.parametrize(
    "step", ["save_weights", "export_onnx", "measure_parity", "render_model_card", "write_manifest", "rename"]
)
@pytest.mark.parametrize("has_old", [True, False], ids=["over an old one", "at a new place"])
def test_a_failed_export_leaves_everything_as_it_was(
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source_and_model: ReadSource,
    step: str,
    has_old: bool,
) -> None:
    out = tmp_path / "bundles" / "paca-vit-of-tests"
    if has_old:
        shutil.copytree(bundle_folder, out)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    if step == "rename":
        fail_to_move_the_new_one(monkeypatch, out)
    else:
        monkeypatch.setattr(bundles, step, fail)
    with pytest.raises(OSError, match="no space left"):
        write_bundle(*source_and_model(), out)
    assert {path.name for path in out.parent.iterdir()} == ({out.name} if has_old else set())
    if has_old:
        assert contents(out) == contents(bundle_folder)
        open_bundle(out)


def fail_to_move_the_new_one(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """The first move to `out` fails; moving things away and back works."""
    failed: list[Path] = []
    rename = Path.rename

    def rename_second_time(self: Path, target: Path) -> Path:
        if target == out and not failed:
            failed.append(target)
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_second_time)


@pytest.mark.usefixtures("_quick_export")
def test_a_new_bundle_replaces_the_old_one_whole(
    bundle_folder: Path, tmp_path: Path, source_and_model: ReadSource
) -> None:
    out = tmp_path / "bundles" / "paca-vit-of-tests"
    shutil.copytree(bundle_folder, out)
    (out / "stray").touch()
    (out / MANIFEST).write_text("{}")
    write_bundle(*source_and_model(), out)
    assert set(open_bundle(out).manifest.files) == {PROGRAM, GOLDEN, WEIGHTS, CARD}
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.usefixtures("_quick_export")
def test_a_bundle_proves_itself_with_the_outputs_that_the_plan_names(
    tmp_path: Path, source_and_model: ReadSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bundles, "make_plan", lambda source, model: replace(make_plan(source, model), golden_outputs=("logits",))
    )
    out = tmp_path / "paca-vit-of-tests"
    write_bundle(*source_and_model(), out)
    assert set(open_bundle(out).read_golden()[1]) == {"logits"}


@pytest.mark.usefixtures("_quick_export")
def test_a_program_that_is_not_the_model_s_equal_is_not_written(tmp_path: Path, source_and_model: ReadSource) -> None:
    source, _ = source_and_model()
    with pytest.raises(ValueError, match="program and module differ"):
        write_bundle(source, make_model(seed=1), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [1 / 3, 1e6])
def test_weights_that_float16_does_not_hold_are_not_rounded_silently(
    tmp_path: Path, source_and_model: ReadSource, value: float
) -> None:
    source, model = source_and_model()
    with torch.no_grad():
        model.get_parameter("head.bias")[0] = value
    with pytest.raises(ValueError, match=r"head\.bias .* float16"):
        write_bundle(source, model, tmp_path / "bundle")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_counters_are_stored_as_the_integers_that_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.BatchNorm1d(2)
    assert model.num_batches_tracked is not None
    model.num_batches_tracked.fill_(100_003)  # beyond what float16 holds
    save_weights(model, tmp_path / WEIGHTS, dtype=dtype)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored["weight"].dtype == dtype
    torch.testing.assert_close(stored["num_batches_tracked"], torch.tensor(100_003), atol=0, rtol=0)


@pytest.mark.usefixtures("_quick_export")
def test_the_model_is_left_as_it_was(tmp_path: Path, source_and_model: ReadSource) -> None:
    source, model = source_and_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    write_bundle(source, model, tmp_path / "bundle")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_whoever_may_read_one_file_may_read_all(bundle_folder: Path) -> None:
    assert len({path.stat().st_mode for path in bundle_folder.iterdir()}) == 1


# Precision


def test_a_manifest_of_the_usual_precision_says_what_it_always_said(bundle_folder: Path) -> None:
    said = json.loads((bundle_folder / MANIFEST).read_text())
    assert "precision" not in said
    assert list(said["golden"]) == ["file", "atol", "rtol", "max_share_off", "outputs"]
    assert open_bundle(bundle_folder).manifest.precision == "fp32"
    assert "Precision" not in (bundle_folder / CARD).read_text()


@pytest.mark.usefixtures("_quick_export")
def test_a_bundle_in_fp16_says_so_and_has_the_tolerances_that_fit(
    bundle_folder: Path, tmp_path: Path, source_and_model: ReadSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    halved: list[nn.Module] = []
    monkeypatch.setattr(bundles, "halve", lambda program: halved.append(program) or program)
    out = tmp_path / "bundle"
    manifest = write_bundle(*source_and_model(), out, precision="fp16")
    assert len(halved) == 1
    assert json.loads((out / MANIFEST).read_text())["precision"] == "fp16"
    assert "| Precision of the program | float16 in layers" in (out / CARD).read_text()
    _, golden = open_bundle(out).read_golden()
    assert manifest.golden.atol_by_output == {
        name: pytest.approx(1e-2 * float(np.abs(array).max())) for name, array in golden.items()
    }
    assert (manifest.golden.rtol, manifest.golden.max_share_off) == (1e-2, 0)
    again = read_source(out)[1].state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in source_and_model()[1].state_dict().items())


@pytest.mark.usefixtures("_quick_export")
def test_the_golden_vectors_of_a_bundle_in_fp16_hold_no_decisions_which_may_be_others(
    tmp_path: Path, source_and_model: ReadSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(source: Source, model: nn.Module) -> Plan:
        made = make_plan(source, model)
        decided = replace(made, max_share_off=0.05)
        run = decided.run
        object.__setattr__(
            decided, "run", lambda inputs: run(inputs) | {"clusters_stage1": run(inputs)["clusters_stage1"].astype(int)}
        )
        return decided

    monkeypatch.setattr(bundles, "make_plan", plan)
    monkeypatch.setattr(bundles, "measure_parity", lambda plan, runtime, *, precision: PARITY)
    out = tmp_path / "bundle"
    manifest = write_bundle(*source_and_model(), out, precision="fp16")
    assert manifest.golden.outputs == ("logits", "evidence")
    assert manifest.golden.max_share_off == MAX_SHARE_OFF_FP16
