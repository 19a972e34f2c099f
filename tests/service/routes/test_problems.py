"""Holds every error answer to one shape: RFC 9457 with code and request id, and nothing of the inside."""

import re
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache as remember
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.bundle import Manifest
from service.catalog import Catalog
from service.endpoint import Endpoint
from service.errors import Overloaded, RanksLost
from service.routes.problems import MEDIA_TYPE, Problem, find_request_id
from service.runtimes import RUNTIMES
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays
from tests.service.conftest import Serve
from tests.service.tiny_bundle import MAX_BODY_BYTES, NAME

pytestmark = pytest.mark.anyio

PATH = "/v1/image-classification"
INTERNAL = re.compile(
    r"Traceback|\.py\b|site-packages|/(tmp|usr|home|work|root|opt)\b|<class|object at 0x|\bNone\b"
    r"|\b[A-Z]\w*(Error|Exception|Warning|Failed|Input|Disconnect)\b|pydantic|PIL\b|Pillow|numpy|onnx|starlette|uvicorn"
)
BOUNDARY = "frontier"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"


@remember
def make_jpeg() -> bytes:
    file = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def make_png(width: int, height: int, *chunks: bytes, is_complete: bool = True) -> bytes:
    """A black picture of one bit a pixel: 20000 x 20000 of them need 50 kB."""
    rows = zlib.compress((b"\0" + bytes((width + 7) // 8)) * height, 9) if is_complete else b""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [make_chunk(b"IHDR", header), *chunks, make_chunk(b"IDAT", rows), make_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_form(*parts: tuple[str, bytes], end: str = f"--{BOUNDARY}--\r\n") -> bytes:
    return b"".join(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + body + b"\r\n" for head, body in parts) + end.encode()


FILE = 'Content-Disposition: form-data; name="file"; filename="a.jpg"'
TEXT_FIELD = 'Content-Disposition: form-data; name="file"'
OTHER_FIELD = 'Content-Disposition: form-data; name="image"; filename="a.jpg"'


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 8192):
        yield body[start : start + 8192]


@dataclass(frozen=True)
class Bad:
    """A request that must be refused."""

    name: str
    status: int
    code: str
    body: Callable[[], Any] = lambda: b""
    path: str = PATH
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    detail: str = ""

    def __str__(self) -> str:
        return self.name


def bad_form(name: str, *parts: tuple[str, bytes], detail: str = "", **other: Any) -> Bad:
    def body() -> bytes:
        return make_form(*parts, **other)

    return Bad(name, 400, "invalid_input", body, headers={"Content-Type": MULTIPART}, detail=detail)


def bad_query(query: str, detail: str = "") -> Bad:
    return Bad(f"query {query[:30]}", 400, "invalid_input", make_jpeg, f"{PATH}?{query}", detail=detail)


def bad_timeout(value: str) -> Bad:
    headers = {"X-Request-Timeout-Seconds": value}
    return Bad(f"timeout {value!r}", 400, "invalid_input", make_jpeg, headers=headers, detail="seconds above 0")


def bad_type(media_type: str) -> Bad:
    headers = {"Content-Type": media_type}
    return Bad(
        f"type {media_type[:30]}", 415, "unsupported_media_type", make_jpeg, headers=headers, detail="image/jpeg"
    )


BAD = [
    # Pictures that are none
    Bad("empty body", 400, "invalid_input", detail="the body is empty"),
    Bad("text as image", 400, "invalid_input", lambda: b"Hello, world", detail="does not start as a picture"),
    Bad("text called image", 400, "invalid_input", lambda: b"Hello", headers={"Content-Type": "image/jpeg"}),
    Bad("truncated JPEG", 400, "invalid_input", lambda: make_jpeg()[:800], detail="damaged, cut off"),
    Bad("only the start of a JPEG", 400, "invalid_input", lambda: make_jpeg()[:3]),
    Bad("truncated PNG", 400, "invalid_input", lambda: make_png(64, 64)[:40]),
    Bad("20000 x 20000", 400, "invalid_input", lambda: make_png(20000, 20000), detail="20000 x 20000"),
    Bad("20000 x 20000, header only", 400, "invalid_input", lambda: make_png(20000, 20000, is_complete=False)),
    Bad(
        "a text that inflates to 100 MB",
        400,
        "invalid_input",
        lambda: make_png(8, 8, make_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))),
    ),
    # Types
    *map(bad_type, ["text/plain", "application/json", "image/tiff", "application/pdf; x=1", "nonsense", "x" * 5000]),
    # Sizes
    Bad(
        "over the limit", 413, "body_too_large", lambda: bytes(MAX_BODY_BYTES + 1), detail=f"{MAX_BODY_BYTES + 1} bytes"
    ),
    Bad("over the limit in chunks", 413, "body_too_large", lambda: in_chunks(bytes(MAX_BODY_BYTES + 1))),
    Bad(
        "a form over the limit",
        413,
        "body_too_large",
        lambda: make_form((FILE, bytes(MAX_BODY_BYTES))),
        headers={"Content-Type": MULTIPART},
    ),
    # Forms
    bad_form("a form of nothing", detail="no field"),
    bad_form("a form without file", (OTHER_FIELD, b"x"), detail="the form has image"),
    bad_form("a file that is a text field", (TEXT_FIELD, b"x"), detail="without the name of a file"),
    bad_form("an empty file", (FILE, b""), detail="the body is empty"),
    bad_form("two files", (FILE, b"x"), (FILE, b"y")),
    bad_form("many fields", *[(TEXT_FIELD, b"x")] * 100),
    bad_form("a field that is too large", (TEXT_FIELD, b"x" * 100_000)),
    bad_form("a part without a name", ("Content-Disposition: form-data", b"x")),
    bad_form("a part without a disposition", ("Content-Type: image/jpeg", b"x")),
    bad_form("a form that is cut off", (FILE, b"x" * 100), end=""),
    Bad("no form at all", 400, "invalid_input", make_jpeg, headers={"Content-Type": MULTIPART}),
    Bad("an empty form", 400, "invalid_input", headers={"Content-Type": MULTIPART}),
    Bad(
        "a form of another boundary", 400, "invalid_input", lambda: b"--other\r\n", headers={"Content-Type": MULTIPART}
    ),
    Bad(
        "a form without a boundary",
        400,
        "invalid_input",
        lambda: make_form((FILE, b"x")),
        headers={"Content-Type": "multipart/form-data"},
    ),
    Bad(
        "a form with an endless boundary",
        400,
        "invalid_input",
        lambda: make_form((FILE, b"x")),
        headers={"Content-Type": f"multipart/form-data; boundary={'x' * 5000}"},
    ),
    Bad(
        "a form of an unknown charset",
        400,
        "invalid_input",
        lambda: make_form(('Content-Disposition: form-data; name="\xff"', b"x")),
        headers={"Content-Type": f"{MULTIPART}; charset=nonsense"},
    ),
    Bad(
        "a part of a wrong type",
        415,
        "unsupported_media_type",
        lambda: make_form((f"{FILE}\r\nContent-Type: text/plain", make_jpeg())),
        headers={"Content-Type": MULTIPART},
        detail="text/plain",
    ),
    # Options
    bad_query("top_k=0", detail="option top_k is '0'"),
    bad_query("top_k=-1"),
    bad_query("top_k=4", detail="this model has 3 classes; ask for 1 to 3 of them"),
    bad_query("top_k=many", detail="option top_k is 'many'"),
    bad_query("top_k="),
    bad_query("top_k=1.5"),
    bad_query("top_k=nan"),
    bad_query(f"top_k={10**30}"),
    bad_query(f"top_k={'9' * 6000}"),
    bad_query("topk=1", detail="option 'topk' is unknown; this task takes top_k"),
    bad_query("top_k=1&top_k=2", detail="option top_k comes 2 times"),
    bad_query("top_k=1&top_k=1"),
    bad_query("=1"),
    bad_query("a%00b=1"),
    bad_query(f"{'x' * 3000}=1"),
    *map(bad_timeout, ["0", "-1", "nan", "inf", "-inf", "1e999", "soon", "", "0x10", "1 s", "x" * 1000]),
    Bad(
        "a deadline that has passed",
        504,
        "deadline_exceeded",
        make_jpeg,
        headers={"X-Request-Timeout-Seconds": "1e-9"},
        detail="1e-09 s",
    ),
    # Paths and methods
    Bad("unknown model", 404, "unknown_model", make_jpeg, f"{PATH}/gpt", detail=f"this service has {NAME}"),
    Bad("odd model", 404, "unknown_model", make_jpeg, f"{PATH}/%00%ff<script>"),
    Bad("unknown manifest", 404, "unknown_model", path="/v1/models/gpt", method="GET", detail=NAME),
    Bad("unknown path", 404, "unknown_path", path="/v2/nothing", method="GET", detail="/v2/nothing"),
    Bad("unknown task", 404, "unknown_path", path="/v1/image-poetry"),
    Bad("a slash at the end", 404, "unknown_path", make_jpeg, f"{PATH}/"),
    Bad("a slash after a model", 404, "unknown_path", make_jpeg, f"{PATH}/{NAME}/"),
    Bad("a slash after the models", 404, "unknown_path", path="/v1/models/", method="GET"),
    Bad("the folder of the assets", 404, "unknown_path", path="/docs/assets", method="GET"),
    Bad("too deep", 404, "unknown_path", path=f"{PATH}/{NAME}/more"),
    Bad("unknown asset", 404, "unknown_path", path="/docs/assets/nothing.js", method="GET"),
    Bad("above the assets", 404, "unknown_path", path="/docs/assets/%2e%2e/core.py", method="GET"),
    Bad("a very long path", 404, "unknown_path", path="/" + "x" * 5000, method="GET"),
    Bad("the root", 404, "unknown_path", path="/", method="GET"),
    Bad("GET of a task", 405, "method_not_allowed", path=PATH, method="GET", detail="GET is not allowed"),
    Bad("DELETE of a model", 405, "method_not_allowed", path=f"/v1/models/{NAME}", method="DELETE"),
    Bad("POST of an asset", 405, "method_not_allowed", path="/docs/assets/swagger-ui.css"),
    Bad("POST of health", 405, "method_not_allowed", path="/health/ready"),
]


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Hold an answer to the shape of all errors, and give its body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    body: dict[str, Any] = answer.json()
    assert set(body) == set(Problem.model_fields)
    assert Problem.model_validate(body, strict=True)
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["title"]
    assert body["detail"].count(";") >= 1, "what came, what was expected, what to do"
    assert len(answer.content) < 1500
    said = body["detail"].replace(str(answer.request.url.path)[:200], "")  # what the client itself sent is no secret
    assert not INTERNAL.search(said), said
    if status == 503:
        assert int(answer.headers["retry-after"]) >= 1
    return body


@pytest.mark.parametrize("bad", BAD, ids=str)
async def test_every_bad_request_is_refused_in_the_same_shape(client: httpx.AsyncClient, bad: Bad) -> None:
    answer = await client.request(bad.method, bad.path, content=bad.body(), headers=bad.headers)
    body = check_problem(answer, bad.status, bad.code)
    assert bad.detail in body["detail"]


@pytest.mark.parametrize("bad", BAD, ids=str)
async def test_after_a_bad_request_a_good_one_is_answered(client: httpx.AsyncClient, bad: Bad) -> None:
    await client.request(bad.method, bad.path, content=bad.body(), headers=bad.headers)
    assert (await client.post(PATH, content=make_jpeg())).status_code == 200


async def test_a_method_that_is_not_allowed_is_told_which_one_is(client: httpx.AsyncClient) -> None:
    answer = await client.get(PATH)
    assert answer.headers["allow"] == "POST"


# Errors that are the service's own


class FailingRuntime(OnnxRuntime):
    """Works while the bundle opens, then fails or gives what its `spoil` makes of the outputs."""

    spoil: Callable[[Arrays], Arrays] | None = None

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        found = super().run(inputs, outputs)
        return found if self.spoil is None else self.spoil(found)


def raise_internal(*_: object, **__: object) -> Any:
    raise RuntimeError("/usr/lib/secret.py: Traceback of a KeyError")


SPOILED = {
    "a program that fails": raise_internal,
    "logits that are not finite": lambda found: {name: array * np.nan for name, array in found.items()},
    "logits of another number": lambda found: {name: array[:, :2] for name, array in found.items()},
    "no outputs": lambda found: {},
}


@pytest.mark.parametrize("name", SPOILED)
async def test_a_model_that_fails_tells_nothing_of_the_inside(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def open_failing(path: Path, *, device: str, native_library: Path | None) -> FailingRuntime:
        opened = open_onnx(path, device=device, native_library=native_library)
        return FailingRuntime(opened._session, version=opened.version, device=opened.device)

    monkeypatch.setitem(RUNTIMES, "onnx", open_failing)
    async with serve() as client:
        monkeypatch.setattr(FailingRuntime, "spoil", staticmethod(SPOILED[name]))
        check_problem(await client.post(PATH, content=make_jpeg()), 500, "model_failed")
        monkeypatch.setattr(FailingRuntime, "spoil", None)
        assert (await client.post(PATH, content=make_jpeg())).status_code == 200


@pytest.mark.parametrize(
    ("owner", "name", "method", "path"),
    [
        (Catalog, "find", "POST", PATH),
        (Endpoint, "predict", "POST", PATH),
        (Catalog, "get", "GET", f"/v1/models/{NAME}"),
        (Manifest, "model_dump", "GET", f"/v1/models/{NAME}"),
    ],
    ids=str,
)
async def test_a_fault_of_the_service_tells_nothing_of_the_inside(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, method: str, path: str
) -> None:
    monkeypatch.setattr(owner, name, raise_internal)
    check_problem(await client.request(method, path, content=b"x"), 500, "internal_error")


async def test_a_full_queue_says_when_to_come_back(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise Overloaded("256 requests are waiting; at most 256 may; try again in 7 s", retry_after_seconds=7)

    monkeypatch.setattr(Endpoint, "predict", refuse)
    answer = await client.post(PATH, content=make_jpeg())
    check_problem(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "7"


async def test_a_lost_recording_says_when_to_come_back(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(*_: object, **__: object) -> None:
        raise RanksLost("the processes that shared this recording ended; send it again in 9 s", retry_after_seconds=9)

    monkeypatch.setattr(Endpoint, "predict", lose)
    answer = await client.post(PATH, content=make_jpeg())
    check_problem(answer, 503, "ranks_lost")
    assert answer.headers["retry-after"] == "9"


async def test_a_service_that_stops_refuses_in_the_same_shape(
    client: httpx.AsyncClient,
) -> None:
    app = client._transport.app  # type: ignore[attr-defined]
    await app.state.catalog.drain()
    check_problem(await client.post(PATH, content=make_jpeg()), 503, "not_ready")
    check_problem(await client.get("/health/ready"), 503, "not_ready")
    assert (await client.get("/health/live")).status_code == 200
    assert (await client.get("/metrics")).status_code == 200


# Request ids


@pytest.mark.parametrize("given", ["a", "8f14e45fceea467f", "A.b_c-9", "x" * 64])
@pytest.mark.parametrize("path", [PATH, "/nowhere"])
async def test_a_well_formed_request_id_is_taken_over(client: httpx.AsyncClient, given: str, path: str) -> None:
    answer = await client.post(path, content=make_jpeg(), headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given", ["", " ", "a b", "x" * 65, "é".encode().decode("latin-1"), "<b>", "a/b", 'a"b', "a;b"]
)
@pytest.mark.parametrize("path", [PATH, "/nowhere"])
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, given: str, path: str) -> None:
    headers = {b"X-Request-Id": given.encode("latin-1")}
    answers = [await client.post(path, content=make_jpeg(), headers=headers) for _ in range(2)]
    made = [answer.headers["x-request-id"] for answer in answers]
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in made)
    assert made[0] != made[1]


def test_a_request_id_cannot_end_a_header_line() -> None:
    from starlette.requests import Request

    scope = {"type": "http", "headers": [(b"x-request-id", b"abc\n")]}
    assert find_request_id(Request(scope)) != "abc\n"
