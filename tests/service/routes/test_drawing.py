import io
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image

from service.app import create_app
from service.errors import NotAcceptable
from service.sample import Arrays, Sample
from service.settings import Settings
from service.tasks import TASKS
from service.tasks.image_classification import IMAGE_CLASSIFICATION, ImageClassification
from service.tasks.task import Task
from tests.service.conftest import Serve
from tests.service.routes.test_problems import check_problem, make_jpeg
from tests.service.tiny_bundle import NAME

pytestmark = pytest.mark.anyio

PATH = f"/v1/{IMAGE_CLASSIFICATION.name}"
PNG = {"Accept": "image/png"}


class DrawingTask(ImageClassification):
    """Draws a picture in the colour that its scores were made of, unless one class alone is asked for."""

    drawing = "A colour."

    def __init__(self) -> None:
        self.threads: list[str] = []

    def check_drawing(self, options: Any, spec: Any) -> None:
        if options.top_k == 1:
            raise NotAcceptable("top_k is 1; a drawing shows all classes; leave top_k out")

    def draw(self, outputs: Arrays, sample: Sample, spec: Any, options: Any) -> bytes:
        self.threads.append(threading.current_thread().name)
        file = io.BytesIO()
        Image.new("RGB", (2, 2), tuple(round(float(value) * 16) for value in outputs["logits"])).save(file, "PNG")
        return file.getvalue()


@pytest.fixture
async def drawing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service whose task draws."""
    task = DrawingTask()
    monkeypatch.setitem(TASKS, task.name, task)
    async with serve() as client:
        yield client
    assert all(name.startswith("worker-") for name in task.threads), "drawing must not block the event loop"


def make_png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("path", [PATH, f"{PATH}/{NAME}"])
async def test_a_picture_is_drawn_for_who_prefers_one(drawing: httpx.AsyncClient, path: str) -> None:
    answer = await drawing.post(path, content=make_png((160, 32, 80)), headers=PNG)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).getpixel((0, 0)) == (160, 32, 80)
    assert "postprocess;dur=" in answer.headers["server-timing"]


async def test_a_wish_in_a_second_header_counts_too(drawing: httpx.AsyncClient) -> None:
    headers = [("Accept", "text/html"), ("Accept", "image/png")]
    answer = await drawing.post(PATH, content=make_jpeg(), headers=headers)
    assert answer.headers["content-type"] == "image/png"


@pytest.mark.parametrize("accept", ["*/*", "application/json", "image/png, */*"])
async def test_all_others_get_json(drawing: httpx.AsyncClient, accept: str) -> None:
    answer = await drawing.post(PATH, content=make_jpeg(), headers={"Accept": accept})
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"model", "version", "predictions"}


async def test_options_without_a_drawing_are_refused_before_any_work(drawing: httpx.AsyncClient) -> None:
    answer = await drawing.post(PATH, content=b"no picture", headers=PNG, params={"top_k": 1})
    assert "top_k is 1" in check_problem(answer, 406, "not_acceptable")["detail"]


async def test_errors_are_no_pictures(drawing: httpx.AsyncClient) -> None:
    check_problem(await drawing.post(PATH, content=b"no picture", headers=PNG), 400, "invalid_input")


async def test_a_task_that_draws_nothing_refuses(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageClassification, "check_drawing", Task.check_drawing)
    answer = await client.post(PATH, content=make_jpeg(), headers=PNG)
    detail = check_problem(answer, 406, "not_acceptable")["detail"]
    assert detail.startswith("a picture is asked for; image-classification answers with JSON only;")


@pytest.mark.parametrize("name", TASKS)
async def test_what_is_described_is_what_is_drawn(name: str) -> None:
    task = TASKS[name]
    assert (
        bool(task.drawing) == (type(task).draw is not Task.draw) == (type(task).check_drawing is not Task.check_drawing)
    )
    operation = create_app(Settings()).openapi()["paths"][f"/v1/{name}"]["post"]
    assert ("image/png" in operation["responses"]["200"]["content"]) == bool(task.drawing)
    assert ("406" in operation["responses"]) == bool(task.drawing)
    assert "application/json" in operation["responses"]["200"]["content"]
