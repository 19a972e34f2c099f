import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.endpoint import Endpoint
from service.routes.predict import TIMEOUT_HEADER
from service.settings import Settings
from tests.service.conftest import Serve
from tests.service.tiny_bundle import LABELS, NAME

pytestmark = pytest.mark.anyio

PATH = "/v1/image-classification"
MakePicture = Callable[..., bytes]


async def test_the_default_model_answers_where_none_is_named(
    client: httpx.AsyncClient, make_picture: MakePicture
) -> None:
    picture = make_picture((0, 200, 40))
    answer = await client.post(PATH, content=picture)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["model", "version", "predictions"]
    assert (body["model"], body["version"]) == (NAME, "1.2.3")
    assert [set(prediction) for prediction in body["predictions"]] == [{"label", "index", "score"}] * 3
    assert [prediction["label"] for prediction in body["predictions"]] == ["green", "blue", "red"]
    assert (await client.post(f"{PATH}/{NAME}", content=picture)).json() == body


@pytest.mark.parametrize("top_k", [1, 2, 3])
async def test_top_k_says_how_many_classes_come_back(
    client: httpx.AsyncClient, make_picture: MakePicture, top_k: int
) -> None:
    answer = await client.post(PATH, content=make_picture((9, 9, 9)), params={"top_k": top_k})
    assert [prediction["label"] for prediction in answer.json()["predictions"]] == list(LABELS[:top_k])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (8, 8), (301, 200)])
async def test_every_format_and_size_is_answered(
    client: httpx.AsyncClient, make_picture: MakePicture, kind: str, size: tuple[int, int]
) -> None:
    answer = await client.post(PATH, content=make_picture((250, 10, 10), size=size, kind=kind))
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["label"] == "red"


async def test_neighbours_in_a_batch_do_not_change_an_answer(
    client: httpx.AsyncClient, make_picture: MakePicture
) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 3)).tolist()
    pictures = [make_picture(tuple(colour)) for colour in colours]
    alone = [(await client.post(PATH, content=picture)).json() for picture in pictures]
    together = await asyncio.gather(*(client.post(PATH, content=picture) for picture in pictures))
    assert [answer.json() for answer in together] == alone


async def test_bad_pictures_harm_no_good_ones(client: httpx.AsyncClient, make_picture: MakePicture) -> None:
    good = make_picture((255, 0, 0), size=(64, 64), kind="JPEG")
    bodies = [good[: len(good) // 2] if index % 31 == 7 else good for index in range(155)]
    answers = await asyncio.gather(*(client.post(PATH, content=body) for body in bodies))
    assert [answer.status_code for answer in answers] == [400 if index % 31 == 7 else 200 for index in range(155)]


async def test_an_answer_carries_its_stage_times(client: httpx.AsyncClient, make_picture: MakePicture) -> None:
    answer = await client.post(PATH, content=make_picture((1, 1, 1)))
    stages = [part.partition(";dur=")[0].strip() for part in answer.headers["server-timing"].split(",")]
    assert set(stages) == {"decode", "queue", "run", "postprocess"}


# Deadlines


@pytest.mark.parametrize(("given", "passed"), [(None, 20.0), ("2.5", 2.5), ("1e1", 10.0), ("20", 20.0), ("3600", 20.0)])
async def test_a_request_may_ask_for_less_time_than_the_longest(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, make_picture: MakePicture, given: str | None, passed: float
) -> None:
    seen: list[float] = []
    predict = Endpoint.predict

    async def spy(self: Endpoint, *args: Any, timeout_seconds: float, **others: Any) -> Any:
        seen.append(timeout_seconds)
        return await predict(self, *args, timeout_seconds=timeout_seconds, **others)

    monkeypatch.setattr(Endpoint, "predict", spy)
    async with serve(request_timeout_seconds=20.0) as client:
        headers = {} if given is None else {TIMEOUT_HEADER: given}
        assert (await client.post(PATH, content=make_picture((1, 1, 1)), headers=headers)).status_code == 200
    assert seen[0] <= passed  # what reading the body took is gone
    assert seen[0] == pytest.approx(passed, abs=2.0)


async def test_a_body_that_takes_longer_than_the_deadline_is_not_worked_on(
    serve: Serve, make_picture: MakePicture
) -> None:
    async def slowly() -> Any:
        yield make_picture((1, 1, 1))[:10]
        await asyncio.sleep(0.05)

    async with serve() as client:
        answer = await client.post(PATH, content=slowly(), headers={TIMEOUT_HEADER: "0.01"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    assert "the body took longer" in answer.json()["detail"]


async def test_a_body_that_does_not_arrive_in_time_is_given_up(serve: Serve, make_picture: MakePicture) -> None:
    async def never() -> Any:
        yield make_picture((1, 1, 1))[:10]
        await asyncio.get_running_loop().create_future()

    async with serve(body_timeout_seconds=0.02) as client:
        answer = await client.post(PATH, content=never())
    assert (answer.status_code, answer.json()["code"]) == (408, "request_timeout")
    assert answer.json()["detail"].startswith("10 bytes of the body came in 0.02 s")
    assert answer.headers["connection"] == "close"


# Clients that leave


async def call_app(app: Any, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Call the application as a server does for a client that leaves after these messages."""
    left = [*messages, {"type": "http.disconnect"}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": PATH,
        "raw_path": PATH.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("is_whole", [True, False], ids=["after the body", "within the body"])
async def test_a_client_that_leaves_is_counted_as_cancelled(
    settings: Callable[..., Settings], make_picture: MakePicture, is_whole: bool
) -> None:
    app = create_app(settings())
    async with app.router.lifespan_context(app):
        message = {"type": "http.request", "body": make_picture((1, 1, 1)), "more_body": not is_whole}
        await call_app(app, message)
        endpoint = app.state.catalog.get(NAME)
        metrics = endpoint.metrics
        assert metrics._requests.labels(NAME, "cancelled")._value.get() == 1
        assert metrics.queue_depth._value.get() == 0


# Logs


async def test_a_request_is_one_log_line_without_its_payload(
    client: httpx.AsyncClient, make_picture: MakePicture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.access")
    headers = {"X-Request-Id": "abc"}
    await client.post(PATH, content=make_picture((1, 1, 1)), headers=headers)
    await client.post(PATH, content=b"SECRET PAYLOAD", headers=headers)
    await client.post(f"{PATH}/gpt", content=b"SECRET PAYLOAD", headers=headers)
    lines = [record.fields for record in caplog.records if record.name == "service.access"]
    assert [(line["outcome"], line["status"], line["request_id"]) for line in lines] == [
        ("ok", 200, "abc"),
        ("invalid_input", 400, "abc"),
        ("unknown_model", 404, "abc"),
    ]
    assert [line.get("model") for line in lines] == [NAME, NAME, None]
    stages = {f"{stage}_seconds" for stage in ("decode", "queue", "run", "postprocess")}
    assert stages | {"seconds"} <= set(lines[0])
    assert "SECRET" not in json.dumps(lines)
