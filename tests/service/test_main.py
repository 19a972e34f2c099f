"""The service as a process: what sockets, signals and exit codes show."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn

from service.__main__ import DrainingServer, _bind, _listen
from service.app import create_app
from service.bundle import MANIFEST
from service.errors import SettingError
from service.settings import Settings
from tests.golden_files import REPOSITORY
from tests.service.server_process import (
    HOST,
    PATH,
    PATIENCE_SECONDS,
    Reply,
    ServerProcess,
    ask,
    environment,
    eventually,
    predict_head,
    read_from,
    read_reply,
    send_all_at_once,
)
from tests.service.tiny_bundle import MAX_BODY_BYTES, NAME

BODY_TIMEOUT_SECONDS = 0.5
MAX_QUEUE = 4

MakePicture = Callable[..., bytes]


class GatedServer(ServerProcess):
    """A service with one worker, whose program waits while the gate is closed and a picture is bright."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "tests.service.gated_service", str(folder)]
        super().__init__(command, folder=folder, workers=1, **settings)

    def open_gate(self) -> None:
        (self.folder / "open").touch()

    def close_gate(self) -> None:
        (self.folder / "open").unlink(missing_ok=True)

    def runs(self) -> list[list[int]]:
        """The first value of each picture of each batch so far; half-written lines are left out."""
        text = (self.folder / "runs").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def has_run(self, value: int) -> bool:
        return any(value in batch for batch in self.runs())


@pytest.fixture(scope="module")
def gated(tiny_bundle: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatedServer]:
    folder = tmp_path_factory.mktemp("gated")
    fields = {"bundles": tiny_bundle.parent, "cache": cache, "max_queue": MAX_QUEUE, "device": "cpu"}
    with GatedServer(folder, body_timeout_seconds=BODY_TIMEOUT_SECONDS, **fields) as server:
        yield server


@pytest.fixture
def server(gated: GatedServer) -> Iterator[GatedServer]:
    """The service behind its gate, which is closed, with nothing in its queue."""
    gated.close_gate()
    yield gated
    gated.open_gate()
    eventually(lambda: gated.metric("inference_queue_depth") == 0)


@pytest.fixture
def background() -> Iterator[Callable[..., "Future[Reply]"]]:
    """Runs a call on another thread."""
    with ThreadPoolExecutor(16) as pool:
        yield pool.submit


def grey(make_picture: MakePicture, value: int) -> bytes:
    return make_picture((value, value, value), size=(8, 8))


# Connections


def test_a_connection_survives_errors(server: GatedServer, make_picture: MakePicture) -> None:
    connection = server.open()
    connection.connect()
    sock = connection.sock
    for path, body, media_type, status in [
        (PATH, b"no picture", "image/png", 400),
        (PATH, bytes(100_000), "text/plain", 415),
        (f"{PATH}/gpt", bytes(100_000), "image/png", 404),
        ("/nowhere", bytes(100_000), "image/png", 404),
        (f"{PATH}?top_k=99", bytes(100_000), "image/png", 400),
        (PATH, grey(make_picture, 9), "image/png", 200),
    ]:
        assert ask(connection, "POST", path, body, Content_Type=media_type).status == status
        assert connection.sock is sock
    connection.close()


@pytest.mark.parametrize("factor", [2, 40])
def test_a_body_over_the_limit_in_chunks_is_refused(server: GatedServer, factor: int) -> None:
    chunk = bytes(16_384)
    with server.connect() as sock:
        sock.sendall(predict_head("Transfer-Encoding: chunked"))
        try:
            for _ in range(factor * MAX_BODY_BYTES // len(chunk)):
                sock.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            sock.sendall(b"0\r\n\r\n")
        except (ConnectionResetError, BrokenPipeError):
            pass  # the service need not read on; its answer is there nevertheless
        reply = read_from(sock)
    assert (reply.status, reply.json()["code"]) == (413, "body_too_large")
    assert reply.headers["connection"] == "close"


def test_an_announced_body_over_the_limit_is_refused_before_it_is_sent(server: GatedServer) -> None:
    with server.connect() as sock:
        sock.sendall(predict_head(f"Content-Length: {MAX_BODY_BYTES + 1}", "Expect: 100-continue"))
        assert read_from(sock).status == 413


def test_a_client_that_sends_too_slowly_is_given_up(server: GatedServer) -> None:
    with server.connect() as sock:
        sock.sendall(predict_head("Content-Length: 1000") + bytes(10))
        reply = read_from(sock)
        assert (reply.status, reply.json()["code"]) == (408, "request_timeout")
        assert sock.recv(1) == b"", "the connection is closed"


def test_a_body_that_is_cut_off_is_counted_and_harms_nobody(server: GatedServer, make_picture: MakePicture) -> None:
    before = server.metric("inference_requests_total", outcome="cancelled")
    with server.connect() as sock:
        sock.sendall(predict_head("Content-Length: 1000") + bytes(10))
    eventually(lambda: server.metric("inference_requests_total", outcome="cancelled") == before + 1)
    assert server.post(PATH, grey(make_picture, 9)).status == 200


@pytest.mark.parametrize("text", [b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET\r\n\r\n", b"A" * 100_000])
def test_what_is_no_http_harms_nobody(server: GatedServer, make_picture: MakePicture, text: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        assert b"Traceback" not in sock.recv(10_000)
    assert server.post(PATH, grey(make_picture, 9)).status == 200


# Waiting requests


def test_a_client_that_leaves_is_counted_and_its_work_dropped(
    server: GatedServer, make_picture: MakePicture, background: Callable[..., "Future[Reply]"]
) -> None:
    before = server.metric("inference_requests_total", outcome="cancelled")
    first = background(server.post, PATH, grey(make_picture, 201))
    eventually(lambda: server.has_run(201))
    leaver = server.open()
    leaver.request("POST", PATH, grey(make_picture, 202))
    eventually(lambda: server.metric("inference_queue_depth") == 2)
    leaver.close()
    eventually(lambda: server.metric("inference_requests_total", outcome="cancelled") == before + 1)
    assert server.metric("inference_queue_depth") == 1
    last = background(server.post, PATH, grey(make_picture, 203))
    eventually(lambda: server.metric("inference_queue_depth") == 2)
    server.open_gate()
    assert (first.result().status, last.result().status) == (200, 200)
    assert server.has_run(203)
    assert not server.has_run(202)


def test_a_request_past_its_deadline_is_answered_and_its_work_dropped(
    server: GatedServer, make_picture: MakePicture, background: Callable[..., "Future[Reply]"]
) -> None:
    first = background(server.post, PATH, grey(make_picture, 211))
    eventually(lambda: server.has_run(211))
    late = server.post(PATH, grey(make_picture, 212), X_Request_Timeout_Seconds="0.05")
    assert (late.status, late.json()["code"]) == (504, "deadline_exceeded")
    last = background(server.post, PATH, grey(make_picture, 213))
    eventually(lambda: server.metric("inference_queue_depth") == 2)
    server.open_gate()
    assert (first.result().status, last.result().status) == (200, 200)
    assert not server.has_run(212)


def test_a_request_whose_deadline_passes_while_it_runs_is_answered_then(
    server: GatedServer, make_picture: MakePicture
) -> None:
    late = server.post(PATH, grey(make_picture, 221), X_Request_Timeout_Seconds="0.3")
    assert (late.status, late.json()["code"]) == (504, "deadline_exceeded")


def test_one_request_more_than_the_queue_holds_is_told_to_come_back(
    server: GatedServer, make_picture: MakePicture, background: Callable[..., "Future[Reply]"]
) -> None:
    accepted = [background(server.post, PATH, grey(make_picture, 231)) for _ in range(MAX_QUEUE)]
    eventually(lambda: server.metric("inference_queue_depth") == MAX_QUEUE)
    refused = server.post(PATH, grey(make_picture, 232))
    assert (refused.status, refused.json()["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert server.get("/health/ready").status == 200
    server.open_gate()
    assert [reply.result().status for reply in accepted] == [200] * MAX_QUEUE


def test_its_log_is_json_lines(server: GatedServer) -> None:
    server.get("/health/live")
    lines = [json.loads(line) for line in server.log().splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_service_after_the_accepted_requests(
    tiny_bundle: Path,
    cache: Path,
    tmp_path: Path,
    make_picture: MakePicture,
    background: Callable[..., "Future[Reply]"],
    number: signal.Signals,
) -> None:
    with GatedServer(tmp_path, bundles=tiny_bundle.parent, cache=cache, device="cpu") as server:
        idle, sending = server.open(), server.connect()
        assert ask(idle, "GET", "/health/ready").status == 200
        picture = grey(make_picture, 200)
        accepted = [background(server.post, PATH, picture) for _ in range(3)]
        eventually(lambda: server.metric("inference_queue_depth") == 3)
        sending.sendall(predict_head(f"Content-Length: {len(picture)}") + picture[:10])
        server.send_signal(number)
        eventually(lambda: server.get("/health/ready").status == 503)
        assert ask(idle, "GET", "/health/ready").status == 503
        assert server.get("/health/live").status == 200
        assert server.metric("inference_queue_depth") == 3
        refused = server.post(PATH, picture)
        assert (refused.status, refused.json()["code"]) == (503, "not_ready")
        assert int(refused.headers["retry-after"]) >= 1
        sending.sendall(picture[10:])
        assert read_from(sending).status == 503, "its body was not there when the signal came"
        assert server.process.poll() is None
        server.open_gate()
        assert [reply.result().status for reply in accepted] == [200] * 3
        assert server.wait() == 0
        assert "Traceback" not in server.log()
        idle.close()
        sending.close()


def test_a_second_signal_ends_the_service_at_once(
    tiny_bundle: Path, cache: Path, tmp_path: Path, make_picture: MakePicture
) -> None:
    with GatedServer(tmp_path, bundles=tiny_bundle.parent, cache=cache, device="cpu") as server:
        waiting = server.open()
        waiting.request("POST", PATH, grey(make_picture, 200))
        eventually(lambda: server.has_run(200))
        server.send_signal(signal.SIGTERM)
        eventually(lambda: server.get("/health/ready").status == 503)
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        waiting.close()


def test_the_second_signal_ends_even_while_the_event_loop_is_busy(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(os, "_exit", calls.append)
    app = create_app(settings())
    server = DrainingServer(uvicorn.Config(app, log_config=None), app.state.catalog)
    server._loop = SimpleNamespace(
        call_soon_threadsafe=lambda callback: calls.append(callback.__name__)
    )  # never runs it
    server.handle_exit(signal.SIGINT, None)
    server.handle_exit(signal.SIGINT, None)
    assert calls == ["_start_drain", 128 + signal.SIGINT]


def test_a_signal_before_the_event_loop_runs_ends_the_start(settings: Callable[..., Settings]) -> None:
    app = create_app(settings())
    server = DrainingServer(uvicorn.Config(app, log_config=None), app.state.catalog)
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit


def test_what_drains_too_long_is_given_up(
    tiny_bundle: Path, cache: Path, tmp_path: Path, make_picture: MakePicture
) -> None:
    fields = {"bundles": tiny_bundle.parent, "cache": cache, "device": "cpu", "drain_seconds": 0.1}
    with GatedServer(tmp_path, request_timeout_seconds=600.0, **fields) as server:
        waiting = server.open()
        waiting.request("POST", PATH, grey(make_picture, 200))
        eventually(lambda: server.has_run(200))
        server.send_signal(signal.SIGTERM)
        eventually(lambda: "requests unanswered after 0.1 s" in server.log())
        reply = read_reply(waiting)
        assert (reply.status, reply.json()["code"]) == (503, "not_ready")
        waiting.close()
        assert server.wait() == 0, "a batch that never ends holds nothing up"
        assert "without waiting any longer" in server.log()


# Load


def test_600_requests_at_once_are_all_answered_or_told_to_come_back(
    tiny_bundle: Path, cache: Path, tmp_path: Path, make_picture: MakePicture
) -> None:
    command = [sys.executable, "-m", "service"]
    with ServerProcess(command, folder=tmp_path, bundles=tiny_bundle.parent, cache=cache) as server:
        picture = make_picture((200, 9, 9), size=(640, 480), kind="JPEG")
        replies = asyncio.run(send_all_at_once(server.port, 600, picture))
        assert {reply.status for reply in replies} <= {200, 503}
        assert sum(reply.status == 200 for reply in replies) >= 256  # what the queue holds by default
        for reply in replies:
            if reply.status == 503:
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.json()["code"] == "overloaded"
            else:
                assert reply.json()["predictions"][0]["label"] == "red"
        assert server.metric("inference_queue_depth") == 0
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0


# Starts that are refused


def run_to_its_end(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=REPOSITORY,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_settings_that_do_not_fit_are_all_named_before_anything_starts() -> None:
    ended = run_to_its_end(port="http", device="tpu")
    assert ended.returncode == 2
    first, second = ended.stderr.splitlines()
    assert first.startswith("SERVICE_PORT is 'http': ")
    assert second.startswith("SERVICE_DEVICE is 'tpu': ")


def test_arguments_are_refused_with_what_to_do_instead() -> None:
    ended = run_to_its_end("--port", "9000")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "usage: SERVICE_PORT=8001 python -m service" in ended.stderr
    assert "unrecognized arguments: --port 9000" in ended.stderr


def test_a_damaged_bundle_ends_the_start_with_the_file_named(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundles" / NAME)
    (copy / MANIFEST).write_text("{}")
    ended = run_to_its_end(bundles=copy.parent, port=0)
    assert (ended.returncode, ended.stderr) == (1, "")
    (line,) = [json.loads(line) for line in ended.stdout.splitlines()]
    assert line["level"] == "error"
    assert line["message"].startswith("cannot start: ")
    assert MANIFEST in line["message"]


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
def test_a_port_that_is_taken_ends_the_start_with_one_line(tmp_path: Path, setting: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        # The bundles are not looked at: they would take long.
        ended = run_to_its_end(bundles=tmp_path / "none", **{"port": 0, setting: port})
    assert (ended.returncode, ended.stderr) == (1, "")
    (line,) = [json.loads(line) for line in ended.stdout.splitlines()]
    name = f"SERVICE_{setting.upper()}"
    assert line["level"] == "error"
    assert line["message"] == (
        f"cannot start: {name}: {HOST}:{port} cannot be listened on: Address already in use; set {name} to a port that "
        "is free, and SERVICE_HOST to an address of this machine"
    )


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_ends_the_start_with_one_line(tmp_path: Path, host: str) -> None:
    ended = run_to_its_end(bundles=tmp_path / "none", host=host, port=0)
    assert (ended.returncode, ended.stderr) == (1, "")
    (line,) = [json.loads(line) for line in ended.stdout.splitlines()]
    assert line["message"].startswith(f"cannot start: SERVICE_PORT: {host}:0 cannot be listened on: ")


def test_one_port_for_both_ends_the_start_with_one_line() -> None:
    ended = run_to_its_end(port=8123, metrics_port=8123)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("SERVICE_METRICS_PORT is '8123': ")
    assert "that is SERVICE_PORT; set another one" in line


@pytest.mark.parametrize(("host", "family"), [("localhost", socket.AF_INET), ("::", socket.AF_INET6)])
def test_one_family_of_addresses_is_served(host: str, family: socket.AddressFamily) -> None:
    if family == socket.AF_INET6 and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with _bind("SERVICE_PORT", host, 0) as listener:
        assert listener.family == family
        if family == socket.AF_INET6:
            assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_a_port_that_is_taken_meanwhile_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (_bind("SERVICE_PORT", HOST, 0) for _ in range(2))
    port = first.getsockname()[1]
    second.close()
    second = _bind("SERVICE_PORT", HOST, port)  # neither listens yet
    with first, second:
        _listen("SERVICE_PORT", first)
        with pytest.raises(SettingError, match=f"SERVICE_PORT: {HOST}:{port} cannot be listened on"):
            _listen("SERVICE_PORT", second)
