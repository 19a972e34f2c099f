from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from export.explanations import EvidenceModel, describe_explanation
from export.pictures import PHOTOS, SAMPLES
from models.paca_teacher import PaCaTeacherViTClassifier
from models.paca_vit import PaCaViTClassifier, PaCaViTConfig
from models.tcformer import TCFormerClassifier, TCFormerConfig
from service.app import create_app
from service.bundle import open_bundle
from service.runtimes.onnx import open_onnx
from service.settings import Settings
from service.tasks.image_classification import (
    IMAGE_CLASSIFICATION,
    ImageClassificationOptions,
    ImageClassificationSpec,
)
from tests.export.conftest import LABELS, SIDE, make_model
from tests.export.tiny_pictures import CLASSIFIERS, SEGMENTERS, TEACHER, make_picture_model

FRAME = {"height": 32, "width": 48}


def test_a_bundle_of_paca_tells_what_its_clusters_explain(bundle_folder: Path) -> None:
    manifest = open_bundle(bundle_folder).manifest
    spec = ImageClassificationSpec.model_validate(manifest.spec)
    assert spec.explanation is not None
    assert spec.explanation.model_dump() == {"kind": "patch_clusters", "stages": ({"stage": 1, "grid": (8, 8)},)}
    shapes = {tensor.name: tensor.shape for tensor in manifest.outputs}
    assert shapes == {
        "logits": ("batch", len(LABELS)),
        "clusters_stage1": ("batch", 5, 64),
        "evidence": ("batch", len(LABELS), 4, 4),
    }
    assert set(spec.explanation.outputs) < set(shapes)


def test_the_program_s_evidence_adds_up_to_its_logits(bundle_folder: Path) -> None:
    runtime = open_onnx(bundle_folder / "model.onnx", device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    found = runtime.run({"image": images}, ["logits", "evidence"])
    runtime.close()
    np.testing.assert_allclose(found["evidence"].sum((2, 3)), found["logits"], rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.anyio
async def test_an_explanation_over_http_is_that_of_the_program_called_in_process(
    bundle_folder: Path, tmp_path: Path
) -> None:
    manifest, body = open_bundle(bundle_folder).manifest, (SAMPLES / PHOTOS[0]).read_bytes()
    spec, options = (
        ImageClassificationSpec.model_validate(manifest.spec),
        ImageClassificationOptions(explain="clusters"),
    )
    runtime = open_onnx(bundle_folder / "model.onnx", device="cpu")
    sample = IMAGE_CLASSIFICATION.decode(body, "", spec)
    batch = {name: array[np.newaxis] for name, array in sample.inputs.items()}
    outputs = {name: rows[0] for name, rows in runtime.run(batch, IMAGE_CLASSIFICATION.outputs(options, spec)).items()}
    runtime.close()
    facts = {"model": manifest.name, "version": manifest.version}
    expected = IMAGE_CLASSIFICATION.postprocess(outputs, sample, spec, options, **facts)
    app = create_app(Settings(bundles=bundle_folder.parent, cache=tmp_path, device="cpu", workers=1))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        url = f"/v1/image-classification/{manifest.name}?explain=clusters"
        answer = await client.post(url, content=body)
        drawn = await client.post(url, content=body, headers={"Accept": "image/png"})
        plain = await client.post(url.partition("?")[0], content=body, headers={"Accept": "image/png"})
    assert answer.json() == expected.model_dump(mode="json", exclude_none=True)
    assert drawn.headers["content-type"] == "image/png"
    assert drawn.content == IMAGE_CLASSIFICATION.draw(outputs, sample, spec, options)
    assert (plain.status_code, plain.json()["code"]) == (406, "not_acceptable")


def test_evidence_comes_behind_the_clusters() -> None:
    model = make_model()
    with torch.inference_mode():
        image = torch.randn(2, 3, SIDE, SIDE)
        logits, clusters = model(image)
        again, outputs = EvidenceModel(model)(image)
    assert torch.equal(again, logits)
    assert len(outputs) == len(clusters) + 1
    assert torch.equal(outputs[0], clusters[0])
    assert outputs[1].shape == (2, len(LABELS), 4, 4)


def test_grids_follow_the_picture_s_shape() -> None:
    found = describe_explanation(make_model(), **FRAME)
    assert found is not None
    assert found.stages[0].grid == (16, 24)


def test_a_model_without_clusters_explains_nothing() -> None:
    config = PaCaViTConfig(
        dims=(8,), num_heads=(2,), depths=(1,), num_clusters=(0,), mlp_ratios=(2,), clustering_kernel_sizes=(3,),
        onsite_clustering=(0,),
    )  # fmt: skip
    assert describe_explanation(PaCaViTClassifier(config, num_classes=2), **FRAME) is None


@pytest.mark.parametrize("stride", [2, 4])
def test_tokens_of_tcformer_are_told_on_the_first_stage_s_grid(stride: int) -> None:
    config = TCFormerConfig(
        dims=(8, 8), num_heads=(1, 1), depths=(1, 1), mlp_ratios=(1, 1), reduction_ratios=(2, 1), sample_ratios=(0.25,),
        stem_stride=stride,
    )  # fmt: skip
    found = describe_explanation(TCFormerClassifier(config, num_classes=2).eval(), **FRAME)
    assert found is not None
    assert found.model_dump() == {
        "kind": "token_regions",
        "stages": ({"stage": 2, "grid": (32 // stride, 48 // stride)},),
    }


def test_a_model_led_by_a_teacher_tells_its_evidence_as_one_that_is_not() -> None:
    model = make_picture_model(CLASSIFIERS["teacher"])
    assert isinstance(model, PaCaTeacherViTClassifier)
    with torch.inference_mode():
        image = torch.randn(2, 3, 32, 48)
        logits, clusters = model(image)
        again, outputs = EvidenceModel(model)(image)
    assert torch.equal(again, logits)
    assert torch.equal(outputs[0], clusters[0])
    torch.testing.assert_close(outputs[1].sum((2, 3)), logits, rtol=1e-5, atol=1e-5)  # float32
    found = describe_explanation(model, **FRAME)
    assert found is not None
    assert found.model_dump() == {"kind": "patch_clusters", "stages": ({"stage": 1, "grid": (8, 12)},)}


def test_a_teacher_that_makes_no_clusters_explains_nothing() -> None:
    config = replace(TEACHER, vit=replace(TEACHER.vit, num_clusters=(0, 0)))
    assert describe_explanation(PaCaTeacherViTClassifier(config, num_classes=2).eval(), **FRAME) is None


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_tell_the_grids_that_their_clusters_are_on(name: str) -> None:
    found = describe_explanation(make_picture_model(SEGMENTERS[name]), height=44, width=60)
    assert found is not None
    grids = {stage.stage: stage.grid for stage in found.stages}
    if name.startswith("paca"):
        assert (found.kind, grids) == ("patch_clusters", {1: (11, 15), 2: (6, 8)})
    else:
        assert (found.kind, grids) == ("token_regions", {2: (11, 15), 3: (11, 15)})
