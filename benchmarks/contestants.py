"""The processes that are measured beside each other: our service, the plain FastAPI route, the bare loop.

Each is started as a user would start it, with its log going to a file, and stays warm between measurements.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plain
from benchmarks.bare import Finding, Job
from benchmarks.client import Address, build_request
from benchmarks.load import exchange
from service.bundle import open_bundle

OURS, PLAIN = "ours", "plain"
START_SECONDS = 60.0
STOP_SECONDS = 40.0
CACHE = Path("build/cache")  # what the service takes by default


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        name: of the contestant.
        address: where it listens.
        path: that predicts.
        process_id: of its only process.
        log: what it wrote.
    """

    name: str
    address: Address
    path: str
    process_id: int
    log: Path

    def build_request(self, picture: bytes) -> bytes:
        """Build the request that sends a JPEG file as the body."""
        return build_request(self.path, picture, media_type="image/jpeg")


class BareLoop:
    """The bare loop in its own process.

    Args:
        process: of `benchmarks.bare`, with pipes.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def measure(self, job: Job) -> Finding:
        """Do a job; returns when it is done.

        Raises: RuntimeError if the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(job.model_dump_json() + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the bare loop ended with status {self._process.wait()}; its error stands above")
        return Finding.model_validate_json(line)


@contextmanager
def run_ours(bundle: Path, scratch: Path, picture: bytes, *, cache: Path = CACHE) -> Iterator[Server]:
    """Run our service with this bundle alone and default settings, until the block ends.

    Args:
        bundle: its folder.
        scratch: folder for the log.
        picture: to ask for the first answer with.
        cache: where the service keeps what its warm-up finds.
    """
    address = _find_address()
    path = f"/v1/image-classification/{open_bundle(bundle).manifest.name}"
    with tempfile.TemporaryDirectory() as served:
        (Path(served) / bundle.name).symlink_to(bundle.resolve())
        settings = {
            "SERVICE_BUNDLES": served,
            "SERVICE_CACHE": str(cache),
            "SERVICE_DEVICE": "cpu",
            "SERVICE_PORT": str(address[1]),
        }
        log = scratch / f"{OURS}.log"
        with _run(["-m", "service"], settings, log) as process:
            server = Server(OURS, address, path, process.pid, log)
            _wait_for_answer(server, process, picture)
            yield server


@contextmanager
def run_plain(bundle: Path, scratch: Path, picture: bytes) -> Iterator[Server]:
    """Run the plain FastAPI route; see `run_ours`."""
    address = _find_address()
    log = scratch / f"{PLAIN}.log"
    with _run(["-m", "benchmarks.plain", str(bundle), str(address[1])], {}, log) as process:
        server = Server(PLAIN, address, plain.PATH, process.pid, log)
        _wait_for_answer(server, process, picture)
        yield server


@contextmanager
def run_bare(bundle: Path) -> Iterator[BareLoop]:
    """Run the bare loop until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bare", str(bundle)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield BareLoop(process)
    finally:
        process.kill()
        process.communicate()


def read_max_batch(server: Server) -> int:
    """Read from our service's log which batch cap its warm-up found."""
    for line in server.log.read_text().splitlines():
        entry = json.loads(line) if line.startswith("{") else {}
        if "max_batch" in entry:
            return int(entry["max_batch"])
    raise ValueError(f"{server.log} does not say max_batch")


@contextmanager
def _run(arguments: Sequence[str], settings: Mapping[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SERVICE_")}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], env={**environment, **settings}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_answer(server: Server, process: "subprocess.Popen[bytes]", picture: bytes) -> None:
    end = time.monotonic() + START_SECONDS
    request = server.build_request(picture)
    while process.poll() is None and time.monotonic() < end:
        try:
            (answer,) = exchange(server.address, [request], num_connections=1, timeout_seconds=10)
        except ConnectionRefusedError:
            time.sleep(0.05)
            continue
        if answer is not None and answer.status == 200:
            return
    process.kill()
    raise RuntimeError(f"{server.name} gave no answer; see {server.log}")


def _find_address() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        host, port = probe.getsockname()
        return host, port
