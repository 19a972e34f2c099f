import asyncio
import gc
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import Request

from service.routes import body as body_module
from service.routes.body import UNDECIDED, check_media_type, read_file
from service.tasks.picture_files import PICTURE_MEDIA_TYPES
from tests.service.routes.test_problems import check_problem
from tests.service.tiny_bundle import MAX_BODY_BYTES

pytestmark = pytest.mark.anyio

PATH = "/v1/image-classification"
MakePicture = Callable[..., bytes]


async def best(client: httpx.AsyncClient, **request: object) -> str:
    answer = await client.post(PATH, **request)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    label: str = answer.json()["predictions"][0]["label"]
    return label


@pytest.mark.parametrize("media_type", sorted(UNDECIDED | PICTURE_MEDIA_TYPES))
async def test_the_file_itself_may_be_the_body(
    client: httpx.AsyncClient, make_picture: MakePicture, media_type: str
) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    assert await best(client, content=make_picture((0, 0, 200)), headers=headers) == "blue"


@pytest.mark.parametrize("media_type", ["IMAGE/PNG", "image/png; charset=binary", " image/png "])
async def test_a_media_type_is_read_as_http_writes_it(
    client: httpx.AsyncClient, make_picture: MakePicture, media_type: str
) -> None:
    assert await best(client, content=make_picture((0, 0, 200)), headers={"Content-Type": media_type}) == "blue"


@pytest.mark.parametrize("part", [("a.png", "image/png"), ("a", "application/octet-stream"), ("", "image/png")])
async def test_the_file_may_be_a_form_s_field(
    client: httpx.AsyncClient, make_picture: MakePicture, part: tuple[str, str]
) -> None:
    name, media_type = part
    assert await best(client, files={"file": (name or "x", make_picture((0, 200, 0)), media_type)}) == "green"


async def test_a_part_without_a_type_is_known_by_its_first_bytes(
    client: httpx.AsyncClient, make_picture: MakePicture
) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    content = head + make_picture((0, 200, 0)) + b"\r\n--b--\r\n"
    assert await best(client, content=content, headers={"Content-Type": "multipart/form-data; boundary=b"}) == "green"


async def test_other_fields_beside_the_file_do_no_harm(client: httpx.AsyncClient, make_picture: MakePicture) -> None:
    file = ("a.png", make_picture((0, 200, 0)), "image/png")
    assert await best(client, files={"file": file}, data={"comment": "mine", "date": "today"}) == "green"


async def test_a_body_may_come_in_chunks_of_unknown_number(
    client: httpx.AsyncClient, make_picture: MakePicture
) -> None:
    picture = make_picture((0, 200, 0))

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(picture), 7):
            yield picture[start : start + 7]

    assert await best(client, content=chunks()) == "green"


async def test_a_body_of_exactly_the_limit_is_read(client: httpx.AsyncClient, make_picture: MakePicture) -> None:
    picture = make_picture((0, 200, 0))
    assert await best(client, content=picture + bytes(MAX_BODY_BYTES - len(picture))) == "green"


@pytest.mark.parametrize("media_type", ["text/plain", "image/tiff"])
async def test_a_wrong_type_is_refused_before_the_body_is_read(client: httpx.AsyncClient, media_type: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise AssertionError("nobody should read on")

    answer = await client.post(PATH, content=body(), headers={"Content-Type": media_type})
    assert answer.status_code == 415


async def test_an_undecided_type_leaves_it_to_the_first_bytes() -> None:
    assert {check_media_type(name, PICTURE_MEDIA_TYPES) for name in UNDECIDED} == {""}
    assert check_media_type("image/gif", PICTURE_MEDIA_TYPES) == "image/gif"


@pytest.mark.parametrize("encoding", ["gzip", "BR", "deflate, gzip", "x" * 200])
async def test_a_compressed_body_is_refused_before_it_is_read(client: httpx.AsyncClient, encoding: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise AssertionError("nobody should read on")

    answer = await client.post(PATH, content=body(), headers={"Content-Encoding": encoding})
    detail = check_problem(answer, 415, "unsupported_media_type")["detail"]
    assert detail.startswith(f"Content-Encoding is {encoding[:100]}; ")


async def test_a_body_that_says_that_it_is_not_compressed_is_read(
    client: httpx.AsyncClient, make_picture: MakePicture
) -> None:
    headers = {"Content-Encoding": "Identity"}
    assert await best(client, content=make_picture((0, 200, 0)), headers=headers) == "green"


@pytest.mark.parametrize("is_large", [True, False])
async def test_a_large_form_is_parsed_beside_the_event_loop(
    client: httpx.AsyncClient, make_picture: MakePicture, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    threads: list[bool] = []
    parse = body_module.MultiPartParser.parse

    async def record(self: body_module.MultiPartParser) -> object:
        threads.append(threading.current_thread() is threading.main_thread())
        return await parse(self)

    monkeypatch.setattr(body_module.MultiPartParser, "parse", record)
    monkeypatch.setattr(body_module, "_LARGE_BYTES", 1 if is_large else 10**9)
    picture = make_picture((0, 200, 0))
    assert await best(client, files={"file": ("a.png", picture, "image/png")}) == "green"
    answer = await client.post(PATH, files={"image": ("a.png", picture, "image/png")})
    assert "the form has image" in check_problem(answer, 400, "invalid_input")["detail"]
    assert threads == [not is_large] * 2


async def test_a_client_who_leaves_before_a_thread_is_free_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body_module, "_LARGE_BYTES", 1)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"--b--\r\n", "more_body": False}

    request = Request(
        {"type": "http", "method": "POST", "headers": [(b"content-type", b"multipart/form-data; boundary=b")]}, receive
    )
    is_free = threading.Event()
    pool = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(pool)
    pool.submit(is_free.wait)
    reading = asyncio.ensure_future(read_file(request, media_types=frozenset(), max_bytes=1000, timeout_seconds=100.0))
    try:
        for _ in range(20):  # turns of the event loop, until it waits for a thread
            await asyncio.sleep(0)
        assert pool._work_queue.qsize() == 1
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            is_free.set()
            pool.shutdown()  # the thread drops what was cancelled
            gc.collect()
        assert [str(warning.message) for warning in found] == []
    finally:
        is_free.set()
