import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bundle import open_bundle
from service.endpoint import Endpoint
from service.errors import BundleError
from service.metrics import Metrics
from service.opening import check_golden, open_endpoint
from service.runtimes import RUNTIMES
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays
from service.settings import Settings
from tests.service.recording_runtime import RecordingRuntime, record_runs
from tests.service.tiny_bundle import GOLDEN, NAME, PROGRAM, make_facts, reseal

MakeSettings = Callable[..., Settings]


def open_it(folder: Path, settings: Settings) -> Endpoint:
    return open_endpoint(open_bundle(folder), settings, Metrics(), ThreadPoolExecutor(1))


def test_a_bundle_that_reproduces_its_golden_outputs_opens(tiny_bundle: Path, settings: MakeSettings) -> None:
    endpoint = open_it(tiny_bundle, settings())
    assert endpoint.manifest.name == NAME
    endpoint.runtime.close()


def test_a_bundle_that_is_refused_leaves_no_program_open(
    bundle_copy: Path, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[OnnxRuntime] = []

    def close(self: OnnxRuntime) -> None:
        closed.append(self)

    monkeypatch.setattr(OnnxRuntime, "close", close)
    (bundle_copy / GOLDEN).write_bytes(b"broken")
    reseal(bundle_copy)
    with pytest.raises(BundleError, match="no npz file"):
        open_it(bundle_copy, settings())
    assert len(closed) == 1


@pytest.mark.parametrize("name", ["logits", "clusters"])
@pytest.mark.parametrize("value", [0.01, np.nan])
def test_a_golden_output_that_is_off_refuses_to_start(
    bundle_copy: Path, settings: MakeSettings, name: str, value: float
) -> None:
    change_golden(bundle_copy, f"output.{name}", lambda array: array + np.float32(value) * (array == array.max()))
    with pytest.raises(BundleError, match=rf"{NAME}.*{name} differs from golden"):
        open_it(bundle_copy, settings())


def spoil_numbers(folder: Path, number: int, value: float) -> None:
    """Changes so many of the six golden logits."""

    def spoil(array: Any) -> Any:
        array.flat[:number] += np.float32(value)
        return array

    change_golden(folder, "output.logits", spoil)


@pytest.mark.parametrize(("number", "opens"), [(1, True), (2, True), (3, False)])
def test_as_many_golden_numbers_may_be_off_as_the_manifest_allows(
    bundle_copy: Path, settings: MakeSettings, number: int, opens: bool
) -> None:
    spoil_numbers(bundle_copy, number, 0.01)
    reseal(bundle_copy, golden={"file": GOLDEN, "atol": 1e-4, "rtol": 1e-4, "max_share_off": 0.34})
    if opens:
        open_it(bundle_copy, settings()).runtime.close()
    else:
        with pytest.raises(BundleError, match=r"logits differs from golden by 0.01, 50.00% of .*; 34.00% may"):
            open_it(bundle_copy, settings())


def test_a_number_that_is_none_is_never_allowed_to_be_off(bundle_copy: Path, settings: MakeSettings) -> None:
    class Broken(OnnxRuntime):
        def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
            found = super().run(inputs, outputs)
            found["logits"].flat[0] = np.nan
            return found

    reseal(bundle_copy, golden={"file": GOLDEN, "atol": 1e-4, "rtol": 1e-4, "max_share_off": 0.9})
    bundle = open_bundle(bundle_copy)
    opened = open_onnx(bundle_copy / PROGRAM, device="cpu")
    broken = Broken(opened._session, version=opened.version, device="cpu")
    with pytest.raises(BundleError, match=r"logits differs from golden by nan, 16.67% of its numbers"):
        check_golden(broken, bundle, *bundle.read_golden())


@pytest.mark.parametrize("name", ["logits", "clusters"])
def test_each_golden_output_is_held_to_its_own_tolerance(bundle_copy: Path, settings: MakeSettings, name: str) -> None:
    change_golden(bundle_copy, f"output.{name}", lambda array: array + np.float32(0.01))
    other = {"logits": "clusters", "clusters": "logits"}[name]
    for wide, is_taken in ((name, True), (other, False)):
        reseal(bundle_copy, golden={"file": GOLDEN, "atol": 1e-4, "rtol": 1e-4, "atol_by_output": {wide: 0.02}})
        if is_taken:
            open_it(bundle_copy, settings()).runtime.close()
        else:
            with pytest.raises(BundleError, match=rf"{name} differs from golden by 0.01, .* than atol 0.0001"):
                open_it(bundle_copy, settings())


def test_a_golden_output_of_another_shape_refuses_to_start(bundle_copy: Path, settings: MakeSettings) -> None:
    change_golden(bundle_copy, "output.logits", lambda array: array[:1])
    with pytest.raises(BundleError, match=rf"{NAME}.*logits has shape \(2, 3\), golden has \(1, 3\)"):
        open_it(bundle_copy, settings())


@pytest.mark.parametrize(
    "change",
    [lambda array: array.astype(np.float32), lambda array: array[:, :4]],
    ids=["type", "size"],
)
def test_a_golden_input_that_the_program_does_not_take_refuses_to_start(
    bundle_copy: Path, settings: MakeSettings, change: Callable[[Any], Any]
) -> None:
    change_golden(bundle_copy, "input.image", change)
    with pytest.raises(BundleError, match=NAME):
        open_it(bundle_copy, settings())


def test_a_golden_file_without_samples_refuses_to_start(bundle_copy: Path, settings: MakeSettings) -> None:
    for name in ("input.image", "output.logits", "output.clusters"):
        change_golden(bundle_copy, name, lambda array: array[:0])
    with pytest.raises(BundleError, match=rf"{NAME}.*is empty and proves nothing"):
        open_it(bundle_copy, settings())


def test_an_output_that_the_program_does_not_give_refuses_to_start(bundle_copy: Path, settings: MakeSettings) -> None:
    with np.load(bundle_copy / GOLDEN) as file:
        arrays = dict(file)
    np.savez(bundle_copy / GOLDEN, **arrays, **{"output.extra": arrays["output.logits"]})
    extra = {"name": "extra", "dtype": "float32", "shape": ["batch", 3]}
    reseal(bundle_copy, outputs=[extra])
    with pytest.raises(BundleError, match=NAME):
        open_it(bundle_copy, settings())


def test_a_bundle_without_an_output_that_its_task_needs_refuses_to_start(
    bundle_copy: Path, settings: MakeSettings
) -> None:
    clusters = {"name": "clusters", "dtype": "float32", "shape": ["batch", 8, 8]}
    reseal(bundle_copy, outputs=[clusters])
    with pytest.raises(BundleError, match=rf"{NAME}.*logits"):
        open_it(bundle_copy, settings())


def test_an_unknown_task_refuses_to_start_naming_those_there_are(bundle_copy: Path, settings: MakeSettings) -> None:
    reseal(bundle_copy, task="image-poetry")
    with pytest.raises(BundleError, match=rf"{NAME}: unknown task image-poetry; known are .*image-classification"):
        open_it(bundle_copy, settings())


@pytest.mark.parametrize("spec", [{}, make_facts()["spec"] | {"hight": 8}, make_facts()["spec"] | {"labels": []}])
def test_a_spec_that_does_not_fit_the_task_refuses_to_start(
    bundle_copy: Path, settings: MakeSettings, spec: dict[str, Any]
) -> None:
    reseal(bundle_copy, spec=spec)
    with pytest.raises(BundleError, match=rf"{NAME}: spec does not fit image-classification"):
        open_it(bundle_copy, settings())


def test_a_program_for_no_known_runtime_refuses_to_start(bundle_copy: Path, settings: MakeSettings) -> None:
    reseal(bundle_copy, programs={"abacus": PROGRAM})
    with pytest.raises(BundleError, match=rf"{NAME} has programs for abacus; this service runs onnx"):
        open_it(bundle_copy, settings())


def change_golden(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    with np.load(folder / GOLDEN) as file:
        arrays = dict(file)
    np.savez(folder / GOLDEN, **arrays | {name: change(arrays[name])})
    reseal(folder)


def test_the_default_options_warm_up_the_program(
    tiny_bundle: Path, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(RUNTIMES, "onnx", record_runs)
    endpoint = open_it(tiny_bundle, settings(cache=tmp_path))
    assert isinstance(endpoint.runtime, RecordingRuntime)
    golden, *warm_up = endpoint.runtime.asked
    assert golden == ("logits", "clusters")
    assert set(warm_up) == {("logits",)}
    endpoint.runtime.close()


def test_opening_tells_what_runs_where(
    tiny_bundle: Path, settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    open_it(tiny_bundle, settings()).runtime.close()
    (record,) = [record for record in caplog.records if record.message == "endpoint opened"]
    assert record.fields["model"] == NAME
    assert record.fields["device"] == "cpu"
    assert 1 <= record.fields["max_batch"] <= 4
