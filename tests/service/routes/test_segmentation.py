"""Image segmentation over HTTP, with a program whose classes are the strongest colours."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.service.conftest import Serve
from tests.service.routes.test_problems import BAD, Bad, check_problem, make_jpeg
from tests.service.routes.test_problems import PATH as CLASSIFICATION
from tests.service.tiny_bundle import LABELS, NAME
from tests.service.tiny_segmenter import SEGMENTER, write_tiny_segmenter

pytestmark = pytest.mark.anyio

PATH = "/v1/image-segmentation"
COLOURS = np.array([(230, 20, 20), (20, 230, 20), (20, 20, 230)], np.uint8)
PNG = {"Accept": "image/png"}

# What the two tasks share: all but the options of the one.
BAD_PICTURES = [
    replace(bad, path=bad.path.replace(CLASSIFICATION, PATH).replace(NAME, SEGMENTER))
    for bad in BAD
    if bad.path.startswith(CLASSIFICATION) and "top" not in bad.path and "text/plain" not in str(bad.detail)
]


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bundle, alone among its siblings."""
    return write_tiny_segmenter(tmp_path_factory.mktemp("segmenters") / SEGMENTER)


@pytest.fixture
async def client(serve: Serve, segmenter: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that serves it."""
    async with serve(bundles=segmenter.parent) as one:
        yield one


def make_scene(width: int, height: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """The class of each pixel: squares of any colour."""
    squares = np.random.default_rng(seed).integers(0, 3, (3, 4), np.uint8)
    return np.asarray(Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST))


def encode(classes: npt.NDArray[np.uint8], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLOURS[classes]).save(file, kind)
    return file.getvalue()


def read(body: dict[str, Any]) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body["mask"]["data"]))))


async def test_each_pixel_gets_the_class_that_it_shows(client: httpx.AsyncClient) -> None:
    scene = make_scene(64, 48)
    answer = await client.post(PATH, content=encode(scene))
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["model", "version", "height", "width", "classes", "mask"]
    assert (body["model"], body["height"], body["width"]) == (SEGMENTER, 48, 64)
    assert list(body["mask"]) == ["media_type", "data"]
    mask = read(body)
    assert (mask == scene).mean() > 0.85  # colours blend where squares meet
    for one in body["classes"]:
        assert one["label"] == LABELS[one["index"]]
        assert one["share"] == (mask == one["index"]).mean()
    assert (await client.post(f"{PATH}/{SEGMENTER}", content=encode(scene))).json() == body


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (9, 7), (1000, 60), (301, 200)], ids=str)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
async def test_pictures_of_every_shape_are_answered(
    client: httpx.AsyncClient, size: tuple[int, int], kind: str
) -> None:
    body = (await client.post(PATH, content=encode(make_scene(*size), kind))).json()
    assert (body["width"], body["height"]) == size
    assert read(body).shape == size[::-1]


async def test_a_client_that_prefers_a_picture_gets_the_mask_or_the_overlay(client: httpx.AsyncClient) -> None:
    content = encode(make_scene(100, 80))
    expected = read((await client.post(PATH, content=content)).json())
    answer = await client.post(PATH, content=content, headers=PNG)
    assert answer.headers["content-type"] == "image/png"
    drawn = Image.open(io.BytesIO(answer.content))
    assert drawn.mode == "P"
    np.testing.assert_array_equal(np.asarray(drawn), expected)
    answer = await client.post(PATH, content=content, headers=PNG, params={"overlay": "true", "mask_format": "rle"})
    assert Image.open(io.BytesIO(answer.content)).mode == "RGB"


async def test_run_lengths_cannot_be_drawn(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, content=make_jpeg(), headers=PNG, params={"mask_format": "rle"})
    check_problem(answer, 406, "not_acceptable")


async def test_options_change_what_comes_back(client: httpx.AsyncClient) -> None:
    params = {"mask_format": "rle", "overlay": "true"}
    body = (await client.post(PATH, content=encode(make_scene(64, 48)), params=params)).json()
    assert list(body["mask"]) == ["size", "counts"]
    assert set(body["mask"]["counts"]) == {str(one["index"]) for one in body["classes"]}
    assert body["overlay"]["media_type"] == "image/png"


async def test_neighbours_of_other_sizes_do_not_change_an_answer(client: httpx.AsyncClient) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 200, (24, 2)).tolist()
    pictures = [encode(make_scene(*size, seed=seed), "JPEG") for seed, size in enumerate(sizes)]
    alone = [(await client.post(PATH, content=picture)).content for picture in pictures]
    together = await asyncio.gather(*(client.post(PATH, content=picture) for picture in pictures))
    assert [answer.content for answer in together] == alone
    metrics = (await client.get("/metrics")).text
    count = next(line for line in metrics.splitlines() if line.startswith("inference_batch_size_count"))
    assert float(count.split()[-1]) < 2 * len(pictures), "some of them were in one batch"


@pytest.mark.parametrize("bad", BAD_PICTURES, ids=str)
async def test_what_image_classification_refuses_is_refused(client: httpx.AsyncClient, bad: Bad) -> None:
    answer = await client.request(bad.method, bad.path, content=bad.body(), headers=bad.headers)
    body = check_problem(answer, bad.status, bad.code)
    assert bad.detail in body["detail"] or NAME in bad.detail


async def test_an_option_that_there_is_not_is_refused_with_those_there_are(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, content=make_jpeg(), params={"top_k": 1})
    assert "mask_format, overlay, explain" in check_problem(answer, 400, "invalid_input")["detail"]


async def test_a_model_without_clusters_refuses_to_explain(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, content=make_jpeg(), params={"explain": "clusters"})
    assert "tells no clusters" in check_problem(answer, 400, "invalid_input")["detail"]
