"""The last rung of the parity ladder, for every bundle in `bundles/`: HTTP ↔ program ↔ module."""

from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from export.model_card import render_model_card
from export.parity import MAX_RELATIVE_ERROR, row_errors
from export.pictures import PHOTOS, SAMPLES
from export.planners import make_plan
from export.recordings import RECORDING, read_recording
from export.source import read_source
from service.app import create_app
from service.bundle import open_bundle
from service.collate import pad
from service.runtimes.native import find_native_library
from service.runtimes.onnx import open_onnx
from service.settings import Settings
from service.tasks.image_classification import ImageClassificationSpec
from service.tasks.pictures import decode_picture
from service.tasks.speech_recognition import SPEECH_RECOGNITION, SpeechRecognitionOptions, SpeechRecognitionSpec
from tests.golden_files import REPOSITORY

BUNDLES = sorted(path.parent for path in (REPOSITORY / "bundles").glob("*/manifest.json"))
CLASSIFIERS, RECOGNISERS, BRAIN_NETWORKS = (
    [folder for folder in BUNDLES if open_bundle(folder).manifest.task == task]
    for task in ("image-classification", "speech-recognition", "brain-network-classification")
)
MAX_BYTES = 12_000_000

parametrize_bundles = pytest.mark.parametrize("folder", BUNDLES, ids=lambda folder: folder.name)
parametrize_recognisers = pytest.mark.parametrize("folder", RECOGNISERS, ids=lambda folder: folder.name)
parametrize_classifiers = pytest.mark.parametrize("folder", CLASSIFIERS, ids=lambda folder: folder.name)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[[], Settings]:
    return lambda: Settings(bundles=REPOSITORY / "bundles", cache=tmp_path, device="cpu", workers=1)


@pytest.mark.anyio
@parametrize_classifiers
async def test_a_classifier_s_answer_over_http_equals_the_program_called_in_process(
    folder: Path, settings: Callable[[], Settings]
) -> None:
    manifest = open_bundle(folder).manifest
    spec = ImageClassificationSpec.model_validate(manifest.spec)
    runtime = open_onnx(folder / manifest.programs["onnx"], device="cpu")
    app = create_app(settings())
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        for photo in PHOTOS:
            body = (SAMPLES / photo).read_bytes()
            url = f"/v1/image-classification/{manifest.name}?top_k={len(spec.labels)}"
            answer = (await client.post(url, content=body)).json()
            image = decode_picture(body, spec)[np.newaxis]
            logits = runtime.run({"image": image}, ["logits"])["logits"][0].astype(np.float64)
            scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            found = {prediction["index"]: prediction["score"] for prediction in answer["predictions"]}
            np.testing.assert_allclose([found[index] for index in range(len(scores))], scores, rtol=1e-9, atol=0)
            assert all(spec.labels[one["index"]] == one["label"] for one in answer["predictions"])
            assert (answer["model"], answer["version"]) == (manifest.name, manifest.version)
    runtime.close()


@pytest.mark.anyio
@parametrize_recognisers
async def test_a_recogniser_s_answer_over_http_equals_the_program_called_in_process(
    folder: Path, settings: Callable[[], Settings]
) -> None:
    manifest = open_bundle(folder).manifest
    spec = SpeechRecognitionSpec.model_validate(manifest.spec)
    # The service takes a kernel that was built here, so this side has to.
    library = find_native_library(settings().native_library)
    runtime = open_onnx(folder / manifest.programs["onnx"], device="cpu", native_library=library)
    app = create_app(settings())
    transport = httpx.ASGITransport(app)
    sample, options = read_recording(spec), SpeechRecognitionOptions(timestamps="word")
    outputs = {name: rows[0] for name, rows in runtime.run(pad([sample]), ["log_probs"]).items()}
    facts = {"model": manifest.name, "version": manifest.version}
    expected = SPEECH_RECOGNITION.postprocess(outputs, sample, spec, options, **facts)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        url = f"/v1/speech-recognition/{manifest.name}?timestamps=word"
        answer = await client.post(url, content=(SAMPLES / RECORDING).read_bytes())
    assert answer.json() == expected.model_dump(exclude_none=True)
    runtime.close()


def test_the_readme_s_recording_is_transcribed_as_the_readme_says() -> None:
    folder = REPOSITORY / "bundles" / "ctc-transformer-small-an4"
    manifest = open_bundle(folder).manifest
    spec = SpeechRecognitionSpec.model_validate(manifest.spec)
    runtime = open_onnx(folder / manifest.programs["onnx"], device="cpu")
    sample = SPEECH_RECOGNITION.decode((REPOSITORY / "samples" / "speech_an4_mcel.wav").read_bytes(), "audio/wav", spec)
    outputs = {name: rows[0] for name, rows in runtime.run(pad([sample]), ["log_probs"]).items()}
    runtime.close()
    facts = {"model": manifest.name, "version": manifest.version}
    result = SPEECH_RECOGNITION.postprocess(outputs, sample, spec, SpeechRecognitionOptions(), **facts)
    assert result.model_dump_json(exclude_none=True) in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@parametrize_bundles
def test_the_shipped_program_equals_the_module_made_of_the_shipped_weights(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    plan = make_plan(*read_source(folder))
    runtime = open_onnx(folder / manifest.programs["onnx"], device="cpu")
    batch = plan.parity_batches[-1]
    found = runtime.run(batch, plan.output_names)
    for name, expected in plan.run(batch).items():
        is_near = row_errors(found[name], expected) <= MAX_RELATIVE_ERROR  # 1e-5, in another order of sums
        assert is_near.mean() >= 1 - plan.max_share_off
    runtime.close()


@pytest.mark.parametrize("folder", BRAIN_NETWORKS, ids=lambda folder: folder.name)
def test_a_connectome_gets_the_same_bits_alone_and_in_every_batch(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    plan = make_plan(*read_source(folder))
    runtime = open_onnx(folder / manifest.programs["onnx"], device="cpu")
    batch = {name: np.concatenate([inputs[name] for inputs in plan.parity_batches]) for name in plan.parity_batches[0]}
    number = len(next(iter(batch.values())))
    alone = [
        runtime.run({name: array[row : row + 1] for name, array in batch.items()}, plan.output_names)
        for row in range(number)
    ]
    for size in (2, 3, 5, 8, number):
        found = runtime.run({name: array[:size] for name, array in batch.items()}, plan.output_names)
        for name in plan.output_names:
            np.testing.assert_array_equal(found[name], np.concatenate([one[name] for one in alone[:size]]), name)
    runtime.close()


@parametrize_bundles
def test_a_shipped_bundle_is_small_and_its_card_says_what_its_manifest_says(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    assert folder.name == manifest.name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    assert (folder / "MODEL_CARD.md").read_text() == render_model_card(manifest)


@parametrize_bundles
def test_the_licence_of_a_shipped_bundle_s_data_is_told(folder: Path) -> None:
    assert folder.name in (REPOSITORY / "bundles" / "LICENSES.md").read_text()
