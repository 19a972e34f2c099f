"""The last rung of the parity ladder, for every bundle in `bundles/`: HTTP ↔ program ↔ module."""

from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from export.image_classifier import ImageClassifierProgram
from export.model_card import render_model_card
from export.onnx_program import EXPORT_BATCH
from export.parity import MAX_RELATIVE_ERROR, relative_error
from export.pictures import PHOTOS, SAMPLES, cut_crops
from export.source import read_source
from service.app import create_app
from service.bundle import open_bundle
from service.runtimes.onnx import open_onnx
from service.settings import Settings
from service.tasks.image_classification import ImageClassificationSpec
from service.tasks.pictures import decode_picture
from tests.golden_files import REPOSITORY

BUNDLES = sorted(path.parent for path in (REPOSITORY / "bundles").glob("*/manifest.json"))
CLASSIFIERS = [folder for folder in BUNDLES if open_bundle(folder).manifest.task == "image-classification"]
MAX_BYTES = 10_000_000

parametrize_bundles = pytest.mark.parametrize("folder", BUNDLES, ids=lambda folder: folder.name)
parametrize_classifiers = pytest.mark.parametrize("folder", CLASSIFIERS, ids=lambda folder: folder.name)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[[], Settings]:
    return lambda: Settings(bundles=REPOSITORY / "bundles", cache=tmp_path, device="cpu", workers=1)


@pytest.mark.anyio
@parametrize_classifiers
async def test_the_answer_over_http_equals_the_program_called_in_process(
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


@parametrize_classifiers
@torch.inference_mode()
def test_the_shipped_program_equals_the_module_made_of_the_shipped_weights(folder: Path) -> None:
    manifest = open_bundle(folder).manifest
    source, model = read_source(folder)
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    program = ImageClassifierProgram(model, first, source.normalisation).eval()
    images = cut_crops(ImageClassificationSpec.model_validate(manifest.spec), EXPORT_BATCH + 3)
    names = [tensor.name for tensor in manifest.outputs]
    runtime = open_onnx(folder / manifest.programs["onnx"], device="cpu")
    found = runtime.run({"image": images}, names)
    for name, expected in zip(names, program(torch.from_numpy(images)), strict=True):
        assert relative_error(found[name], expected.numpy()) <= MAX_RELATIVE_ERROR  # 1e-5, in another order of sums
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
