import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from export.bundles import PROGRAMS, write_bundle
from export.onnx_program import OPSET
from export.plan import EXPORT_BATCH, Plan
from export.planners import make_plan
from export.source import Source, read_source
from export.torchscript_program import export_torchscript
from service.bundle import open_bundle
from service.runtimes.torchscript import open_torchscript
from service.sample import Arrays
from tests.export.conftest import make_model, make_source, quiet_exporter
from tests.export.tiny_recogniser import CLUSTERED, FULL, make_recogniser, make_speech_source

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
TRACES = re.compile(rb"/(home|root|usr|tmp|opt|work|mnt|Users)/|site-packages|\.py\b|Traceback")
# Runs where nothing of ours can be imported; the sizes are none that an export saw.
ALONE = """
import sys, torch
program = torch.jit.load(sys.argv[1])
log_probs, clusters = program(torch.randn(3, 301, 20), torch.tensor([301, 100, 7]))
assert not any(name.split(".")[0] in {"models", "export", "service"} for name in sys.modules)
print(tuple(log_probs.shape), tuple(clusters.shape)[-1])
"""


def make_recogniser_plan(name: str) -> Plan:
    return make_plan(make_speech_source(name), make_recogniser(name))


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    pictures: tuple[Source, object] = make_source(), make_model()
    return {
        "pictures": make_plan(*pictures),
        "clustered speech": make_recogniser_plan(CLUSTERED),
        "full speech": make_recogniser_plan(FULL),
    }


@pytest.fixture(scope="module")
def archives(plans: dict[str, Plan], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("torchscript")
    paths = {name: folder / f"{name}.pt" for name in plans}
    with quiet_exporter():
        for name, plan in plans.items():
            export_torchscript(plan, paths[name])
    return paths


def cut(inputs: Arrays, batch: int) -> Arrays:
    return {name: np.resize(array, (batch, *array.shape[1:])) for name, array in inputs.items()}


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("name", ["pictures", "clustered speech", "full speech"])
def test_the_program_equals_the_module_at_batch_sizes_and_lengths_not_used_for_the_export(
    plans: dict[str, Plan], archives: dict[str, Path], name: str, batch: int
) -> None:
    assert batch != EXPORT_BATCH
    plan = plans[name]
    runtime = open_torchscript(archives[name], device="cpu")
    for inputs in plan.parity_batches:
        assert (
            next(iter(inputs.values())).shape[1:] != next(iter(plan.example.values())).shape[1:] or name == "pictures"
        )
        found = runtime.run(cut(inputs, batch), plan.output_names)
        for output, expected in plan.run(cut(inputs, batch)).items():
            tolerance = 1e-5 * np.abs(expected).max()  # float32 in another order
            np.testing.assert_allclose(found[output], expected, atol=tolerance, rtol=0)
    runtime.close()


def test_both_ways_of_clustered_attention_are_in_the_program(plans: dict[str, Plan], archives: dict[str, Path]) -> None:
    runtime = open_torchscript(archives["clustered speech"], device="cpu")
    found = [runtime.run(batch, ["clusters"])["clusters"] for batch in plans["clustered speech"].parity_batches]
    assert any((one < 0).any() for one in found), "short samples attend in full"
    assert any((one > 0).any() and (one >= 0).all() for one in found), "long ones are clustered"
    runtime.close()


def test_a_program_runs_without_our_code(archives: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-W", "ignore", "-c", ALONE, str(archives["clustered speech"])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "(3, 151, 5) 151"), done.stderr


@pytest.mark.parametrize("name", ["pictures", "clustered speech", "full speech"])
def test_a_program_names_no_device_and_tells_nothing_of_the_machine_that_exported(
    archives: dict[str, Path], name: str
) -> None:
    with zipfile.ZipFile(archives[name]) as archive:
        texts = {member: archive.read(member) for member in archive.namelist() if "/data/" not in member}
    code = b"".join(text for member, text in texts.items() if member.endswith(".py"))
    assert b"forward" in code
    assert b"torch.device(" not in code, "tensors go where the inputs are"
    assert not [member for member in texts if "debug" in member]
    assert not [member for member, text in texts.items() if TRACES.search(text)]


def test_a_bundle_holds_both_programs_and_tells_the_worse_parity(tmp_path: Path) -> None:
    out = tmp_path / "bundles" / make_source().name
    with quiet_exporter():
        manifest = write_bundle(make_source(), make_model(), out, runtimes=["onnx", "torchscript"])
        alone = write_bundle(make_source(), make_model(), tmp_path / "alone", runtimes=["torchscript"])
    assert manifest.programs == PROGRAMS
    assert open_bundle(out).manifest == manifest
    assert (alone.programs, alone.opset) == ({"torchscript": "model.pt"}, None)
    assert manifest.opset == OPSET
    assert manifest.parity.max_relative_error.keys() == alone.parity.max_relative_error.keys()
    for name, error in manifest.parity.max_relative_error.items():
        assert alone.parity.max_relative_error[name] <= error <= 1e-5  # what an export refuses beyond
    again = read_source(out)[0]
    assert again.name == make_source().name
