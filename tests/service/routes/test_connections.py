"""What is held below any request, over real sockets, before a small application that tells what reached it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httptools
import pytest
import uvicorn
from uvicorn.server import ServerState

from service.metrics import Metrics
from service.routes import connections
from service.routes.connections import MAX_HEAD_BYTES, make_connection
from service.routes.problems import MEDIA_TYPE, Problem
from tests.service.server_process import HOST, PATIENCE_SECONDS

pytestmark = pytest.mark.anyio

H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")


async def answer(scope: dict[str, Any], receive: Any, respond: Any) -> None:
    """Answer with the method, the path and the body; at `/early` without waiting for the body."""
    body, is_more = b"", scope["path"] != "/early"
    while is_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, is_more = body + message["body"], message["more_body"]
    text = f"{scope['method']} {scope['path']} ".encode() + body
    await respond({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await respond({"type": "http.response.body", "body": text})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def port(metrics: Metrics) -> AsyncIterator[int]:
    kind = make_connection(metrics)
    config = uvicorn.Config(answer, http=kind, ws="none", log_config=None, timeout_keep_alive=30)
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: kind(config=config, server_state=state, app_state={}), HOST, 0
    )
    yield server.sockets[0].getsockname()[1]
    for connection in list(state.connections):
        connection.transport.close()
    server.close()
    await server.wait_closed()


def head(start: str, *lines: str) -> bytes:
    return "\r\n".join([f"{start} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def send(writer: asyncio.StreamWriter, *parts: bytes) -> None:
    """Send parts, each once the one before had time to arrive."""
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.02)


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """Read the body of an answer that is well."""
    top = await reader.readuntil(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 200"), top
    return await reader.readexactly(int(top.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))


async def ask(port: int, *parts: bytes, num_answers: int) -> list[bytes]:
    """Send parts; gives the bodies of as many answers."""
    async with connect(port) as (reader, writer):
        await send(writer, *parts)
        return [await read_answer(reader) for _ in range(num_answers)]


async def be_refused(port: int, *parts: bytes) -> bytes:
    """Send parts; gives what comes back until the service closes the connection."""
    async with connect(port) as (reader, writer):
        await send(writer, *parts)
        return await reader.read()


class WrittenTransport(asyncio.Transport):
    """Keeps what is written; for pieces of a size that sockets do not promise."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self._is_closing = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self._is_closing = True

    def is_closing(self) -> bool:
        return self._is_closing


def connect_without_network(metrics: Metrics) -> tuple[connections.Connection, WrittenTransport]:
    config = uvicorn.Config(answer, ws="none", log_config=None)
    config.load()
    connection, transport = make_connection(metrics)(config, ServerState(), {}), WrittenTransport()
    connection.connection_made(transport)
    return connection, transport


def count(metrics: Metrics) -> dict[tuple[str, str], float]:
    """The requests of each model and outcome."""
    samples = [sample for family in metrics.requests.collect() for sample in family.samples]
    return {(s.labels["model"], s.labels["outcome"]): s.value for s in samples if s.name.endswith("_total")}


def check_refusal(text: bytes, status: int, code: str, metrics: Metrics) -> str:
    """Hold the bytes of an answer to the shape of all errors, and its count to one; gives its detail."""
    top, _, body = text.partition(b"\r\n\r\n")
    start, *lines = top.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert start.split()[:2] == ["HTTP/1.1", str(status)]
    assert headers["content-type"] == MEDIA_TYPE
    assert headers["connection"] == "close"
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert int(headers["content-length"]) == len(body)
    problem = Problem.model_validate_json(body, strict=True)
    assert (problem.status, problem.code, problem.request_id) == (status, code, headers["x-request-id"])
    assert problem.detail.count("; ") >= 2, "what came, what was expected, what to do"
    assert count(metrics) == {("", code): 1}
    return problem.detail


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        head("FLY /"),
        head("POST /", "Content-Length: -5"),
        head("POST /", "Content-Length: many"),
        head("POST /", f"Content-Length: {10**30}"),
        head("POST /", "Content-Length: 5", "Content-Length: 6"),
        head("POST /", "Content-Length: 5", "Transfer-Encoding: chunked"),
        head("POST /", "Transfer-Encoding: chunked") + b"5\r\nabcde\r\nzz\r\n",
        head("POST /", "a name: x"),
    ],
    ids=lambda text: repr(text[-40:]),
)
async def test_what_is_no_http_is_refused_in_the_shape_of_all_errors(port: int, metrics: Metrics, text: bytes) -> None:
    check_refusal(await be_refused(port, text), 400, "malformed_request", metrics)


CHUNKED = head("POST /", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("start", "filling"),
    [
        (b"GET /", b"x"),
        (b"GET / HTTP/1.1\r\nX: ", b"x"),
        (b"GET / HTTP/1.1\r\n", b"X: x\r\n"),
        (b"\r\n", b"\r\n"),
        (CHUNKED + b"1;", b"x"),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"X: x\r\n"),
    ],
    ids=["path", "header", "headers", "empty lines", "chunk", "trailers"],
)
async def test_what_is_no_body_is_read_to_a_limit(port: int, metrics: Metrics, start: bytes, filling: bytes) -> None:
    # No more than it takes: what is left unread would reset the connection, and with it the answer.
    rest = (filling * (MAX_HEAD_BYTES + 1))[: MAX_HEAD_BYTES + 1]
    detail = check_refusal(await be_refused(port, start, rest), 431, "head_too_large", metrics)
    assert str(MAX_HEAD_BYTES) in detail


@pytest.mark.parametrize(
    "start",
    [
        head(f"GET /{'x' * MAX_HEAD_BYTES}"),
        head("GET /", f"X: {'x' * MAX_HEAD_BYTES}"),
        head("GET /", *["X: x"] * (MAX_HEAD_BYTES // 6)),
        CHUNKED + b"0\r\n" + b"X: x\r\n" * (MAX_HEAD_BYTES // 6) + b"\r\n",
    ],
    ids=["path", "header", "headers", "trailers"],
)
async def test_a_head_over_the_limit_is_refused_although_it_comes_in_one_piece(metrics: Metrics, start: bytes) -> None:
    connection, transport = connect_without_network(metrics)
    connection.data_received(start)
    check_refusal(b"".join(transport.written), 431, "head_too_large", metrics)
    assert transport.is_closing()


async def test_a_head_of_almost_the_limit_a_large_body_and_many_small_chunks_are_read(port: int) -> None:
    sent = head("GET /", f"X: {'x' * (MAX_HEAD_BYTES - 100)}")
    sent += head("POST /", f"Content-Length: {10 * MAX_HEAD_BYTES}") + bytes(10 * MAX_HEAD_BYTES)
    sent += head("POST /", "Transfer-Encoding: chunked") + b"1\r\na\r\n" * MAX_HEAD_BYTES + b"0\r\n\r\n"
    first, second, third = await ask(port, sent, num_answers=3)
    assert first == b"GET / "
    assert len(second) == len("POST / ") + 10 * MAX_HEAD_BYTES
    assert third == b"POST / " + b"a" * MAX_HEAD_BYTES


async def test_a_connection_that_asks_nothing_is_closed_without_a_word(
    port: int, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    assert await be_refused(port) == b""
    assert count(metrics) == {}


async def test_after_an_early_answer_and_the_rest_of_its_body_silence_is_no_request(
    port: int, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    async with connect(port) as (reader, writer):
        await send(writer, head("POST /early", "Content-Length: 10"))
        assert await read_answer(reader) == b"POST /early "
        await send(writer, b"x" * 10)
        assert await reader.read() == b""
    assert count(metrics) == {}


@pytest.mark.parametrize("sent", [b"\r\n", b"GET / HT"], ids=["empty line", "half"])
@pytest.mark.parametrize("is_first", [True, False])
async def test_a_head_that_does_not_come_is_given_up(
    port: int, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, sent: bytes, is_first: bool
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    async with connect(port) as (reader, writer):
        if not is_first:
            writer.write(head("GET /"))
            assert await read_answer(reader) == b"GET / "
        writer.write(sent)
        text = await reader.read()
    check_refusal(text, 408, "request_timeout", metrics)


async def test_a_body_that_nobody_reads_any_longer_is_given_up_without_a_word(
    port: int, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    async with connect(port) as (reader, writer):
        await send(writer, head("POST /early", "Content-Length: 1000") + b"x", b"x")
        assert await read_answer(reader) == b"POST /early "
        assert await reader.read() == b""
    assert count(metrics) == {}


async def test_a_slow_body_is_not_for_the_connection_to_judge(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)
    sent = [head("POST /", "Content-Length: 10"), *[b"x"] * 10]
    assert await ask(port, *sent, num_answers=1) == [b"POST / xxxxxxxxxx"]


# Offers to speak something else


@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_an_offer_to_change_the_protocol_is_ignored_and_the_body_kept(port: int, framing: str, size: int) -> None:
    body = b"abcde" if "Length" in framing else b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"
    sent = head("POST /a", *H2C, framing) + body + head("GET /b") + head("POST /c", *H2C, framing) + body
    async with connect(port) as (reader, writer):
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await asyncio.sleep(0)
        found = [await read_answer(reader) for _ in range(3)]
    assert found == [b"POST /a abcde", b"GET /b ", b"POST /c abcde"]


async def test_many_offers_at_once_are_as_many_requests(port: int) -> None:
    assert await ask(port, head("GET /", *H2C) * 1500, num_answers=1500) == [b"GET / "] * 1500


async def test_after_a_refused_request_another_connection_is_served(port: int) -> None:
    assert b"malformed_request" in await be_refused(port, b"\0" * 100)
    assert await ask(port, head("GET /"), num_answers=1) == [b"GET / "]


async def test_what_follows_a_request_in_hand_does_not_answer_for_it(port: int, metrics: Metrics) -> None:
    sent = head("POST /slow", "Content-Length: 1") + b"x" + b"\0\0\0"
    assert await ask(port, sent, num_answers=1) == [b"POST /slow x"]
    assert count(metrics) == {}


@pytest.mark.parametrize("num_waiting", [0, 1, 2])
@pytest.mark.parametrize(
    "rest",
    [b"zz\r\n", b"1;" + b"x" * MAX_HEAD_BYTES, b"0\r\nX: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n"],
    ids=["malformed", "chunk too large", "trailer too large"],
)
async def test_whole_requests_before_a_broken_body_are_answered(
    port: int, metrics: Metrics, num_waiting: int, rest: bytes
) -> None:
    sent = [head(f"POST /{n}", "Content-Length: 1") + b"x" for n in range(num_waiting + 1)]
    async with connect(port) as (reader, writer):
        writer.write(b"".join(sent) + CHUNKED + b"1\r\na\r\n" + rest)
        writer.write(head("GET /after"))
        found = [await read_answer(reader) for _ in sent]
        with suppress(ConnectionResetError):  # what the service did not read any longer
            assert await reader.read() == b""
    assert found == [b"POST /%d x" % n for n in range(num_waiting + 1)]
    assert count(metrics) == {}


def test_the_parser_still_stops_at_an_offer() -> None:
    """If it does not any longer, what `Connection` does about it can go."""
    with pytest.raises(httptools.HttpParserUpgrade):
        httptools.HttpRequestParser(object()).feed_data(head("POST /", *H2C, "Content-Length: 5") + b"abcde")
