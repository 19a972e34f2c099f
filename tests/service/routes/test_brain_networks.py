"""Brain-network classification over HTTP, with a bundle of six regions."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.tasks.brain_network_answers import RESEARCH_NOTICE
from tests.service.conftest import Serve
from tests.service.tiny_brain_bundle import LABELS, MAX_BODY_BYTES, NAME, NUM_REGIONS, write_tiny_brain_bundle

pytestmark = pytest.mark.anyio

PATH = "/v1/brain-network-classification"
PNG = "image/png"


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the bundle of six regions."""
    return write_tiny_brain_bundle(tmp_path_factory.mktemp("brains") / NAME).parent


@pytest.fixture
async def client(serve: Serve, bundles: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(bundles=bundles) as one:
        yield one


def make_matrix(seed: int = 0) -> Any:
    matrix = np.random.default_rng(seed).uniform(-2, 2, (NUM_REGIONS, NUM_REGIONS)).round(3)
    return np.triu(matrix, 1) + np.triu(matrix, 1).T


def as_json(matrix: Any) -> bytes:
    return json.dumps({"connectivity": matrix.tolist()}).encode()


def as_text(matrix: Any, separator: str) -> bytes:
    return "\n".join(separator.join(map(str, row)) for row in matrix.tolist()).encode()


def as_npy(matrix: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, matrix)
    return file.getvalue()


FILES = {
    "application/json": as_json(make_matrix()),
    "text/csv": as_text(make_matrix(), ","),
    "text/plain": as_text(make_matrix(), " "),
    "application/x-npy": as_npy(make_matrix()),
}


async def test_an_answer_has_class_communities_quality_and_notice(client: httpx.AsyncClient) -> None:
    matrix = make_matrix()
    answer = await client.post(PATH, content=as_json(matrix))
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["model", "version", "label", "probabilities", "communities", "quality", "notice"]
    odds = np.exp(matrix.mean())
    assert body["probabilities"] == pytest.approx(dict(zip(LABELS, [odds / (1 + odds), 1 / (1 + odds)], strict=True)))
    assert body["label"] == LABELS[int(odds < 1)]
    first = matrix[:, :4].argmax(axis=1)
    assert [level["assignment"] for level in body["communities"]] == [first.tolist(), (first // 2).tolist()]
    assert body["quality"]["source"] == "connectivity"
    assert body["notice"] == RESEARCH_NOTICE
    assert (await client.post(f"{PATH}/{NAME}", content=as_json(matrix))).json() == body


@pytest.mark.parametrize("media_type", FILES)
async def test_every_format_gives_the_same_answer(client: httpx.AsyncClient, media_type: str) -> None:
    expected = (await client.post(PATH, content=as_json(make_matrix()))).json()
    file = FILES[media_type]
    for named in (media_type, "application/octet-stream", "application/x-www-form-urlencoded"):
        answer = await client.post(PATH, content=file, headers={"Content-Type": named})
        assert answer.json() == expected
    answer = await client.post(PATH, files={"file": ("a file", file, media_type)})
    assert answer.json() == expected


async def test_a_time_series_is_answered(client: httpx.AsyncClient) -> None:
    series = np.random.default_rng(1).standard_normal((9, NUM_REGIONS))
    z = np.arctanh(np.corrcoef(series.T) * (1 - np.eye(NUM_REGIONS)))
    body = (await client.post(PATH, json={"time_series": series.tolist()})).json()
    expected = (await client.post(PATH, json={"connectivity": z.tolist()})).json()
    assert body["quality"]["num_frames"] == 9
    assert body["communities"] == expected["communities"]
    assert body["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


async def test_weights_come_when_asked_for(client: httpx.AsyncClient) -> None:
    body = (await client.post(PATH, content=as_json(make_matrix()), params={"weights": "true"})).json()
    for level, size in zip(body["communities"], (4, 2), strict=True):
        assert np.shape(level["weights"]) == (NUM_REGIONS, size)
        np.testing.assert_allclose(np.sum(level["weights"], axis=1), 1, rtol=0, atol=1e-5)


async def test_the_picture_comes_in_json_or_as_it_is(client: httpx.AsyncClient) -> None:
    file = as_json(make_matrix())
    explained = (await client.post(PATH, content=file, params={"explain": "communities"})).json()["picture"]
    assert explained["media_type"] == PNG
    drawn = await client.post(PATH, content=file, headers={"Accept": PNG})
    assert (drawn.status_code, drawn.headers["content-type"]) == (200, PNG)
    assert drawn.content == base64.b64decode(explained["data"])
    assert Image.open(io.BytesIO(drawn.content)).format == "PNG"


async def test_a_model_without_communities_has_no_picture(serve: Serve, tmp_path: Path) -> None:
    folder = write_tiny_brain_bundle(tmp_path / "bundles" / NAME, num_communities=[])
    async with serve(bundles=folder.parent) as client:
        file = as_json(make_matrix())
        assert (await client.post(PATH, content=file)).json()["communities"] == []
        drawn = await client.post(PATH, content=file, headers={"Accept": PNG})
        assert (drawn.status_code, drawn.json()["code"]) == (406, "not_acceptable")
        explained = await client.post(PATH, content=file, params={"explain": "communities"})
        assert (explained.status_code, explained.json()["code"]) == (400, "invalid_input")


async def test_alone_and_among_others_a_connectome_gets_the_same_answer(client: httpx.AsyncClient) -> None:
    bodies = [as_json(make_matrix(seed)) for seed in range(30)]
    alone = [(await client.post(PATH, content=body)).content for body in bodies]
    bad = as_json(make_matrix()[:5])
    together = await asyncio.gather(*(client.post(PATH, content=body) for one in bodies for body in (one, bad)))
    assert [answer.content for answer in together[::2]] == alone
    assert {answer.status_code for answer in together[1::2]} == {400}


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/csv"}])
async def test_a_body_of_100_megabytes_is_refused_unread(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    num_sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(1600):
            num_sent += 65_536
            yield b"0,1," * 16_384

    answer = await client.post(PATH, content=body(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert num_sent <= MAX_BODY_BYTES + 65_536
    answer = await client.post(PATH, content=b"", headers={**headers, "Content-Length": "100000000"})
    assert answer.status_code == 413


async def test_a_wrong_media_type_is_refused_with_those_that_are_read(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, content=FILES["application/json"], headers={"Content-Type": "application/x-mat"})
    assert answer.status_code == 415
    assert "application/json, application/x-npy, text/csv, text/plain" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "the body is empty"),
        (b'{"connectivity":' * 400, "the JSON cannot be read"),
        (b'{"connectivity":' * 2_000, "the JSON has more than"),
        (as_json(np.zeros((3, 3))), "this model takes the 6 regions of atlas TINY-6"),
        (as_json(np.eye(6)), "the diagonal has 1 for region A (number 1); 0 was expected"),
        (as_npy(np.array([[object()]])), "elements of type |O"),
    ],
)
async def test_a_bad_file_is_a_problem_that_says_what_to_do(
    client: httpx.AsyncClient, body: bytes, detail: str
) -> None:
    answer = await client.post(PATH, content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_input")
    assert answer.headers["content-type"] == "application/problem+json"
    assert detail in answer.json()["detail"]
