import asyncio
import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bundle import open_bundle
from service.endpoint import Endpoint, check_golden, open_endpoint
from service.errors import BundleError, InvalidInput, ModelFailed
from service.metrics import Metrics
from service.runtimes import RUNTIMES
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays
from service.settings import Settings
from service.tasks import TASKS
from service.tasks.image_classification import IMAGE_CLASSIFICATION, ImageClassification, ImageClassificationOptions
from tests.service.tiny_bundle import GOLDEN, NAME, PROGRAM, make_facts, reseal

MakeSettings = Callable[..., Settings]
OPTIONS = ImageClassificationOptions()
PNG = "image/png"


def open_it(folder: Path, settings: Settings, metrics: Metrics | None = None) -> Endpoint:
    return open_endpoint(open_bundle(folder), settings, metrics or Metrics(), ThreadPoolExecutor(1))


class RecordingRuntime(OnnxRuntime):
    """Remembers which outputs were asked for."""

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        self.asked = [*getattr(self, "asked", []), tuple(outputs)]
        return super().run(inputs, outputs)


def record_runs(path: Path, *, device: str, native_library: Path | None) -> RecordingRuntime:
    opened = open_onnx(path, device=device, native_library=native_library)
    return RecordingRuntime(opened._session, version=opened.version, device=opened.device)


# Opening


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


# Answering


async def started(folder: Path, settings: Settings) -> Endpoint:
    endpoint = open_it(folder, settings)
    endpoint.start(1)
    return endpoint


@pytest.mark.anyio
async def test_an_answer_is_the_task_s_result_as_json(
    tiny_bundle: Path, settings: MakeSettings, make_picture: Callable[..., bytes]
) -> None:
    endpoint = await started(tiny_bundle, settings())
    answer = await endpoint.predict(make_picture((160, 0, 80)), PNG, OPTIONS, timeout_seconds=30)
    body = json.loads(answer.body)
    assert (body["model"], body["version"]) == (NAME, "1.2.3")
    assert [prediction["label"] for prediction in body["predictions"]] == ["red", "blue", "green"]
    logits = np.array([10.0, 0.0, 5.0])
    expected = np.exp(logits) / np.exp(logits).sum()
    scores = {prediction["index"]: prediction["score"] for prediction in body["predictions"]}
    np.testing.assert_allclose([scores[index] for index in range(3)], expected, rtol=1e-5)
    assert set(answer.times) == {"decode", "queue", "run", "postprocess"}
    endpoint.close()


@pytest.mark.anyio
async def test_outputs_that_were_not_asked_for_are_not_copied(
    tiny_bundle: Path, settings: MakeSettings, make_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIMES, "onnx", record_runs)
    endpoint = await started(tiny_bundle, settings())
    assert isinstance(endpoint.runtime, RecordingRuntime)
    endpoint.runtime.asked = []
    await endpoint.predict(make_picture((1, 2, 3)), PNG, OPTIONS, timeout_seconds=30)
    assert endpoint.runtime.asked == [("logits",)]
    endpoint.close()


@pytest.mark.anyio
async def test_options_are_checked_before_any_work(tiny_bundle: Path, settings: MakeSettings) -> None:
    endpoint = await started(tiny_bundle, settings())
    with pytest.raises(InvalidInput, match="this model has 3 classes"):
        await endpoint.predict(b"no picture", PNG, ImageClassificationOptions(top_k=4), timeout_seconds=30)
    endpoint.close()


class ClumsyTask(ImageClassification):
    """Fails as no task should, for bodies that say so."""

    def decode(self, body: bytes, media_type: str, spec: Any) -> Any:
        if body == b"clumsy":
            raise RuntimeError("/secret/path of the decoder")
        return super().decode(body, media_type, spec)


@pytest.mark.anyio
async def test_a_decoder_that_fails_unexpectedly_is_logged_and_tells_the_client_nothing(
    tiny_bundle: Path,
    settings: MakeSettings,
    make_picture: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(TASKS, IMAGE_CLASSIFICATION.name, ClumsyTask())
    endpoint = await started(tiny_bundle, settings())
    with pytest.raises(ModelFailed) as caught:
        await endpoint.predict(b"clumsy", PNG, OPTIONS, timeout_seconds=30)
    assert "secret" not in str(caught.value)
    assert "/secret/path of the decoder" in caplog.text
    await endpoint.predict(make_picture((1, 2, 3)), PNG, OPTIONS, timeout_seconds=30)
    endpoint.close()


@pytest.mark.anyio
async def test_a_request_whose_client_left_is_not_decoded(
    tiny_bundle: Path, settings: MakeSettings, make_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    class WatchedTask(ImageClassification):
        def decode(self, body: bytes, media_type: str, spec: Any) -> Any:
            decoded.append(body)
            return super().decode(body, media_type, spec)

    monkeypatch.setitem(TASKS, IMAGE_CLASSIFICATION.name, WatchedTask())
    endpoint = await started(tiny_bundle, settings())
    is_open = threading.Event()
    endpoint._decode_pool.submit(is_open.wait)  # the only decode thread is busy
    gone = asyncio.ensure_future(endpoint.predict(b"gone", PNG, OPTIONS, timeout_seconds=30))
    picture = make_picture((1, 2, 3))
    stays = asyncio.ensure_future(endpoint.predict(picture, PNG, OPTIONS, timeout_seconds=30))
    await asyncio.wait([gone], timeout=0.01)
    gone.cancel()
    await asyncio.wait([gone])
    is_open.set()
    await stays
    assert decoded == [picture]
    endpoint.close()


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


def test_a_copy_elsewhere_is_the_same_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    assert open_bundle(shutil.copytree(tiny_bundle, tmp_path / "b")).sha256 == open_bundle(tiny_bundle).sha256
