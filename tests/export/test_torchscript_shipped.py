"""TorchScript and ONNX give the same answers for every bundle in `bundles/`, through the service's own task."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.parity import measure_parity
from export.plan import Plan
from export.planners import make_plan
from export.source import read_source
from export.torchscript_program import export_torchscript
from service.bundle import Manifest, open_bundle
from service.collate import pad, stack
from service.runtimes.onnx import open_onnx
from service.runtimes.runtime import Runtime
from service.runtimes.torchscript import open_torchscript
from service.tasks import TASKS
from tests.export.conftest import quiet_exporter
from tests.golden_files import REPOSITORY

BUNDLES = sorted(path.parent for path in (REPOSITORY / "bundles").glob("*/manifest.json"))
SAMPLES = {
    "image-classification": ("photo_cat_cc0.jpg", "photo_coffee_cc0.jpg", "photo_building_ccby2.jpg"),
    "image-segmentation": ("street_camvid_ccbync.jpg",),
    "speech-recognition": ("speech_an4_mcel.wav", "speech_an4_valid.flac"),
    "brain-network-classification": ("connectome_synthetic.csv",),
}
# What each task's answer can hold beyond the usual.
OPTIONS: dict[str, dict[str, Any]] = {
    "image-classification": {"explain": "clusters"},
    "image-segmentation": {},
    "speech-recognition": {"timestamps": "word"},
    "brain-network-classification": {},
}
RELATIVE = 1e-4  # numbers in answers; float32 in another order of sums
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
parametrize_bundles = pytest.mark.parametrize("folder", [pytest.param(folder, id=folder.name) for folder in BUNDLES])
Made = Callable[[Path], tuple[Plan, Path]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Made:
    """Makes the TorchScript program of a bundle, once."""
    folder = tmp_path_factory.mktemp("programs")
    found: dict[Path, tuple[Plan, Path]] = {}

    def make(bundle: Path) -> tuple[Plan, Path]:
        if bundle not in found:
            plan, path = make_plan(*read_source(bundle)), folder / f"{bundle.name}.pt"
            with quiet_exporter():
                export_torchscript(plan, path)
            found[bundle] = plan, path
        return found[bundle]

    return make


def answer(runtime: Runtime, manifest: Manifest, name: str) -> Any:
    """What the service says to a sample file."""
    task = TASKS[manifest.task]
    spec = task.Spec.model_validate(manifest.spec)
    options = task.Options(**OPTIONS[manifest.task])
    sample = task.decode((REPOSITORY / "samples" / name).read_bytes(), "", spec)
    batch = pad([sample]) if manifest.length_buckets else stack([sample])
    outputs = runtime.run(batch, task.outputs(options, spec))
    first = {name: rows[0] for name, rows in outputs.items()}
    return task.postprocess(first, sample, spec, options, model="m", version="1.0.0").model_dump(mode="json")


def check_same(found: Any, expected: Any, place: str = "answer") -> None:
    """Everything equal, numbers with a fraction nearly."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name, value in expected.items():
            check_same(found[name], value, f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, value in enumerate(expected):
            check_same(found[index], value, f"{place}[{index}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=RELATIVE), place
    else:
        assert found == expected, place


@parametrize_bundles
def test_both_programs_of_a_shipped_bundle_give_the_same_answers(folder: Path, made: Made) -> None:
    manifest = open_bundle(folder).manifest
    torchscript = open_torchscript(made(folder)[1], device="cpu")
    onnx = open_onnx(folder / manifest.programs["onnx"], device="cpu")
    for name in SAMPLES[manifest.task]:
        check_same(answer(torchscript, manifest, name), answer(onnx, manifest, name))
    onnx.close()
    torchscript.close()


@parametrize_bundles
def test_a_shipped_bundle_s_torchscript_program_equals_the_module(folder: Path, made: Made) -> None:
    plan, path = made(folder)
    runtime = open_torchscript(path, device="cpu")
    few = {name: array[:1] for name, array in plan.golden.items()}
    expected, found = plan.run(few), runtime.run(few, plan.output_names)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert abs(found[name] - array).max() <= 1e-5 * abs(array).max()  # float32
    runtime.close()


@pytest.mark.slow
@parametrize_bundles
def test_a_shipped_bundle_s_torchscript_program_equals_the_module_on_all_parity_inputs(
    folder: Path, made: Made
) -> None:
    plan, path = made(folder)
    runtime = open_torchscript(path, device="cpu")
    parity = measure_parity(plan, runtime)  # refuses above 1e-5 in more rows than the plan allows
    assert parity.batch_sizes[:2] == (1, 3)
    runtime.close()
