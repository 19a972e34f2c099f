import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bundle import open_bundle
from service.endpoint import Endpoint
from service.errors import InvalidInput, ModelFailed
from service.metrics import Metrics
from service.opening import open_endpoint
from service.runtimes import RUNTIMES
from service.settings import Settings
from service.tasks import TASKS
from service.tasks.image_classification import IMAGE_CLASSIFICATION, ImageClassification, ImageClassificationOptions
from tests.service.recording_runtime import RecordingRuntime, record_runs
from tests.service.tiny_bundle import NAME

MakeSettings = Callable[..., Settings]
OPTIONS = ImageClassificationOptions()
PNG = "image/png"


def open_it(folder: Path, settings: Settings) -> Endpoint:
    return open_endpoint(open_bundle(folder), settings, Metrics(), ThreadPoolExecutor(1))


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
