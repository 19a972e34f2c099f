"""The segmenter that ships, with its real program: batch mates change no answer, and explanations over HTTP."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.bundle import Manifest, open_bundle
from service.collate import stack
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays, Sample
from service.tasks.image_segmentation import IMAGE_SEGMENTATION, ImageSegmentationOptions, ImageSegmentationSpec
from tests.golden_files import REPOSITORY
from tests.service.conftest import Serve

FOLDER = REPOSITORY / "bundles" / "paca-fpn-micro-camvid"
STREET = REPOSITORY / "samples" / "street_camvid_ccbync.jpg"
PATH = f"/v1/image-segmentation/{FOLDER.name}"
# Pieces of the street scene, left, top, right, bottom, and what they are scaled to: of every shape, and two alike.
PIECES = [
    ((0, 0, 480, 360), (480, 360)),
    ((0, 100, 480, 160), (1600, 200)),
    ((200, 0, 260, 360), (60, 360)),
    ((100, 100, 105, 104), (5, 4)),
    ((240, 0, 480, 360), (800, 1200)),
    ((0, 0, 480, 360), (97, 61)),
    ((0, 250, 480, 251), (480, 1)),
    ((0, 0, 480, 360), (480, 360)),
]
BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7], [7, 3, 1], [6, 0], [2, 5, 4, 0, 3, 7, 6, 1]]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return open_bundle(FOLDER).manifest


@pytest.fixture(scope="module")
def spec(manifest: Manifest) -> ImageSegmentationSpec:
    return ImageSegmentationSpec.model_validate(manifest.spec)


@pytest.fixture(scope="module")
def runtime(manifest: Manifest) -> Iterator[OnnxRuntime]:
    opened = open_onnx(FOLDER / manifest.programs["onnx"], device="cpu")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def samples(spec: ImageSegmentationSpec) -> list[Sample]:
    """One of each piece, decoded."""
    street = Image.open(STREET)
    decoded = []
    for box, size in PIECES:
        file = io.BytesIO()
        street.crop(box).resize(size, Image.Resampling.BILINEAR).save(file, "PNG")
        decoded.append(IMAGE_SEGMENTATION.decode(file.getvalue(), "image/png", spec))
    return decoded


def run(runtime: OnnxRuntime, batch: Sequence[Sample]) -> list[Arrays]:
    """The logits of each, as a worker gets them."""
    found = runtime.run(stack(batch), ["logits"])
    return [{name: rows[index] for name, rows in found.items()} for index in range(len(batch))]


def test_a_mask_is_the_same_alone_and_in_a_batch_of_pictures_of_other_sizes(
    runtime: OnnxRuntime, samples: list[Sample], spec: ImageSegmentationSpec
) -> None:
    def answer(outputs: Arrays, sample: Sample) -> tuple[bytes, str]:
        options = ImageSegmentationOptions()
        result = IMAGE_SEGMENTATION.postprocess(outputs, sample, spec, options, model="", version="")
        return IMAGE_SEGMENTATION.draw(outputs, sample, spec, options), result.model_dump_json()

    alone = [answer(run(runtime, [sample])[0], sample) for sample in samples]
    assert len(set(alone)) == len(PIECES) - 1, "but for the two that are alike, answers differ"
    for numbers in BATCHES:
        batch = [samples[number] for number in numbers]
        together = [answer(outputs, sample) for outputs, sample in zip(run(runtime, batch), batch, strict=True)]
        assert together == [alone[number] for number in numbers]


@pytest.mark.anyio
async def test_a_scene_is_explained_over_http(serve: Serve, spec: ImageSegmentationSpec, tmp_path: Path) -> None:
    (tmp_path / FOLDER.name).symlink_to(FOLDER)
    content, png = STREET.read_bytes(), {"Accept": "image/png"}
    async with serve(bundles=tmp_path) as client:
        plain = (await client.post(PATH, content=content)).json()
        answer = await client.post(f"{PATH}?explain=clusters", content=content)
        drawn = await client.post(f"{PATH}?explain=clusters", content=content, headers=png)
        both = await client.post(f"{PATH}?explain=clusters&overlay=true", content=content, headers=png)
        unknown = await client.post(f"{PATH}?explain=tokens", content=content)
    explained = answer.json()
    stages = explained.pop("explanation")["stages"]
    assert explained == plain
    assert spec.explanation is not None
    assert [(one["stage"], tuple(one["grid"])) for one in stages] == [
        (one.stage, one.grid) for one in spec.explanation.stages
    ]
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(plain["mask"]["data"]))))
    for stage in stages:
        assert [one["label"] for one in stage["clusters"]] == [one["label"] for one in plain["classes"][:4]]
        for one, found in zip(stage["clusters"], plain["classes"], strict=False):
            assert 1 / 64 < one["weight"] < 1, "it gathers more than one of 64 clusters would if all were alike"
            picture = Image.open(io.BytesIO(base64.b64decode(one["heat_map"]["data"]))).convert("RGB")
            assert picture.size == (480, 360)
            red, _, blue = np.moveaxis(np.asarray(picture).astype(int), -1, 0)
            is_hot = red > blue + 60
            assert (mask[is_hot] == found["index"]).mean() > 0.6, "heat lies on the class, but for its soft edge"
    assert Image.open(io.BytesIO(drawn.content)).size[0] > 1000
    assert (both.status_code, both.json()["code"]) == (406, "not_acceptable")
    assert (unknown.status_code, unknown.json()["code"]) == (400, "invalid_input")
