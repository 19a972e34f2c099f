"""A service that runs as a process of its own, for what only a process shows: sockets, signals, exit codes."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.golden_files import REPOSITORY

PATIENCE_SECONDS = 60.0  # for what should take a moment, on a machine that is busy
HOST = "127.0.0.1"
PATH = "/v1/image-classification"


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def eventually(condition: Callable[[], Any], *, patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait until a condition holds, and give its value."""
    end = time.monotonic() + patience_seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
    return value


def environment(**settings: Any) -> dict[str, str]:
    """This process's environment with these settings of the service and no others, outside of any `make`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "MAKE", "MFLAGS"))}
    return kept | {f"SERVICE_{name.upper()}": str(value) for name, value in settings.items()}


class ServerProcess:
    """Starts the service on a free port, and ends it at the latest when the `with` block ends.

    Args:
        command: that starts it.
        folder: for its log.
        root: of the repository.
        patience_seconds: for its start.
        settings: of the service.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        root: Path = REPOSITORY,
        patience_seconds: float = PATIENCE_SECONDS,
        **settings: Any,
    ) -> None:
        self._log = folder / "log"
        self._patience_seconds = patience_seconds
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=root,
                env=environment(port=0, **settings),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.port = 0

    def __enter__(self) -> Self:
        started = eventually(
            lambda: re.search(rf"running on http://{HOST}:(\d+)", self.log()) or self._is_over(),
            patience_seconds=self._patience_seconds,
        )
        assert isinstance(started, re.Match), self.log()
        self.port = int(started[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # children too
        self.process.wait()

    def _is_over(self) -> bool:
        return self.process.poll() is not None

    def log(self) -> str:
        """All that it wrote so far."""
        return self._log.read_text()

    def connect(self) -> socket.socket:
        return socket.create_connection((HOST, self.port), timeout=PATIENCE_SECONDS)

    def open(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE_SECONDS)

    def get(self, path: str) -> Reply:
        connection = self.open()
        try:
            return ask(connection, "GET", path)
        finally:
            connection.close()

    def post(self, path: str, body: bytes, **headers: str) -> Reply:
        connection = self.open()
        try:
            return ask(connection, "POST", path, body, **headers)
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The value of a sample, 0 where it is absent; labels in their order in the metric, without the model."""
        end = "".join(f',{label}="{value}"' for label, value in labels.items())
        lines = self.get("/metrics").body.decode().splitlines()
        values = [line.rpartition(" ")[2] for line in lines if re.match(rf'{name}{{model="[^"]*"{end}}} ', line)]
        return float(values[0]) if values else 0.0

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; gives the exit code, negative for the signal that ended it."""
        return self.process.wait(PATIENCE_SECONDS)


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str
) -> Reply:
    """Send a request on an open connection and read the whole answer; `_` stands for `-` in names of headers."""
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return read_reply(connection)


def read_reply(connection: http.client.HTTPConnection) -> Reply:
    response = connection.getresponse()
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def predict_head(*lines: str) -> bytes:
    """The bytes of a request up to its body, for those who write to sockets themselves."""
    return "\r\n".join([f"POST {PATH} HTTP/1.1", f"Host: {HOST}", *lines, "", ""]).encode()


def read_from(sock: socket.socket) -> Reply:
    response = http.client.HTTPResponse(sock)
    response.begin()
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


async def send_all_at_once(port: int, number: int, picture: bytes) -> list[Reply]:
    request = predict_head(f"Content-Length: {len(picture)}", "Connection: close") + picture

    async def send_one() -> Reply:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(request)
        text = await reader.read()
        writer.close()
        await writer.wait_closed()
        top, _, body = text.partition(b"\r\n\r\n")
        status, *lines = top.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return Reply(int(status.split()[1]), headers, body)

    async with asyncio.timeout(PATIENCE_SECONDS):
        return await asyncio.gather(*(send_one() for _ in range(number)))
