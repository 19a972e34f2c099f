"""The service as a process while its operator changes things, and with ports and keys of its own."""

import http.client
import json
import signal
import socket
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.service.server_process import (
    HOST,
    PATH,
    PATIENCE_SECONDS,
    Reply,
    ServerProcess,
    ask,
    eventually,
)
from tests.service.test_main import GatedServer, MakePicture, grey, run_to_its_end
from tests.service.tiny_bundle import NAME, reseal

KEY = "0123456789abcdef0123456789abcdef"
AUTHORIZATION = f"Bearer {KEY}"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    return path


def free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def get_from(port: int, path: str) -> Reply:
    connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE_SECONDS)
    try:
        return ask(connection, "GET", path)
    finally:
        connection.close()


class Clients:
    """Ask without pause, each on a connection of its own, until they are told to end.

    Args:
        server: to be asked.
        picture: that they send.
        number: of them.
    """

    def __init__(self, server: ServerProcess, picture: bytes, *, number: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[str] = Counter()
        self.faults: list[BaseException] = []
        self._server, self._picture = server, picture
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        connection = self._server.open()
        try:
            while not self._is_over.is_set():
                reply = ask(connection, "POST", PATH, self._picture, Authorization=AUTHORIZATION)
                self.statuses[reply.status] += 1
                self.versions[reply.json().get("version", "")] += 1
        except Exception as error:  # noqa: BLE001 - a connection that breaks is what this looks for
            self.faults.append(error)
        finally:
            connection.close()

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)


def test_no_request_fails_while_bundles_are_replaced_under_load(
    bundle_copy: Path, cache: Path, keys_file: Path, tmp_path: Path, make_picture: MakePicture
) -> None:
    command = [sys.executable, "-m", "service"]
    settings = {"bundles": bundle_copy.parent, "cache": cache, "device": "cpu", "api_keys_file": keys_file}
    versions = [f"2.0.{number}" for number in range(4)]
    with ServerProcess(command, folder=tmp_path, **settings) as server:
        assert server.post(PATH, b"").status == 401
        clients = Clients(server, make_picture((200, 9, 9), size=(64, 64)), number=6)
        try:
            for version in versions:
                reseal(bundle_copy, version=version)
                report = server.post("/v1/admin/reload", b"", Authorization=AUTHORIZATION)
                assert report.json()["replaced"] == [NAME]
                eventually(lambda: clients.versions[version] > 20 or clients.faults)  # noqa: B023 - in this very round
        finally:
            clients.end()
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "Traceback" not in server.log()
    assert clients.faults == []
    assert set(clients.statuses) == {200}
    assert set(clients.versions) >= set(versions)


def test_metrics_have_a_port_of_their_own_which_answers_until_the_end(
    tiny_bundle: Path, cache: Path, tmp_path: Path, make_picture: MakePicture
) -> None:
    port = free_port()
    with GatedServer(tmp_path, bundles=tiny_bundle.parent, cache=cache, device="cpu", metrics_port=port) as server:
        assert server.get("/metrics").status == 404
        assert get_from(port, "/metrics").status == 200
        assert get_from(port, "/v1/models").status == 404
        assert get_from(port, "/docs").status == 404
        assert server.get("/health/ready").status == get_from(port, "/health/ready").status == 200
        assert get_from(port, "/metrics").headers["x-content-type-options"] == "nosniff"
        waiting = server.open()
        waiting.request("POST", PATH, grey(make_picture, 200))
        eventually(lambda: server.has_run(200))
        server.send_signal(signal.SIGTERM)
        eventually(lambda: get_from(port, "/health/ready").status == 503)
        assert b'inference_queue_depth{model="' in get_from(port, "/metrics").body
        server.open_gate()
        assert waiting.getresponse().status == 200
        waiting.close()
        assert server.wait() == 0
        assert "Traceback" not in server.log()


def test_keys_that_are_too_short_end_the_start(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("letmein\n")
    ended = run_to_its_end(bundles=tiny_bundle.parent, port=0, api_keys_file=path)
    assert (ended.returncode, ended.stderr) == (1, "")
    (line,) = [json.loads(line) for line in ended.stdout.splitlines()]
    assert "cannot start: SERVICE_API_KEYS_FILE: line 1" in line["message"]
    assert "letmein" not in ended.stdout
