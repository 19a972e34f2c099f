"""Our service with one speech recogniser in a process of its own, its memory, and a client that sends long recordings.

Beside `contestants`, which serves pictures: a recording of half an hour is sent in many pieces, its answer takes longer
than the default deadline, and whether the native kernel runs is chosen.
"""

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.client import Address, build_request
from benchmarks.contestants import CACHE, START_SECONDS, STOP_SECONDS
from service.bundle import open_bundle
from service.tasks.speech_recognition import SPEECH_RECOGNITION

ROOT = Path(__file__).resolve().parent.parent
REQUEST_SECONDS = 600.0
MEDIA_TYPE = "audio/flac"
_STARTED = re.compile(r"running on http://([\d.]+):(\d+)")
_STAGE = re.compile(r"(\w+);dur=([\d.]+)")


class NoAnswer(Exception):
    """The service answered with an error, or not at all."""


class Transcript(NamedTuple):
    """What came back for one recording.

    Attributes:
        text: as the service's default decoding has it.
        seconds: from the first byte sent to the last one received.
        stages: of the service's work → seconds.
    """

    text: str
    seconds: float
    stages: dict[str, float]


class Memory(NamedTuple):
    """Resident memory of a process, bytes: at this moment, and the most since `reset_peak`."""

    current: int
    peak: int


@dataclass(frozen=True)
class SpeechService:
    """A service that answers.

    Attributes:
        address: where it listens.
        path: that transcribes.
        process_id: of its only process.
        kernel: of clustered attention, "native" or "portable".
    """

    address: Address
    path: str
    process_id: int
    kernel: str

    def build_request(self, audio: bytes) -> bytes:
        """Build the request that sends a short FLAC file, for `benchmarks.load`."""
        return build_request(self.path, audio, media_type=MEDIA_TYPE)

    def transcribe(self, audios: Sequence[bytes]) -> list[Transcript]:
        """Send FLAC files of any length, one after the other, on one connection.

        Raises: NoAnswer.
        """
        connection = http.client.HTTPConnection(*self.address, timeout=REQUEST_SECONDS + 10)
        try:
            return [self._send(connection, audio) for audio in audios]
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"the service gave no answer: {error}") from error
        finally:
            connection.close()

    def _send(self, connection: http.client.HTTPConnection, audio: bytes) -> Transcript:
        start = time.perf_counter()
        connection.request("POST", self.path, audio, {"Content-Type": MEDIA_TYPE})
        response = connection.getresponse()
        body = response.read()
        seconds = time.perf_counter() - start
        answer = json.loads(body)
        if response.status != 200:
            raise NoAnswer(f"the service answered {response.status}: {answer.get('detail')}")
        timing = response.headers.get("Server-Timing", "")
        return Transcript(answer["text"], seconds, {name: float(ms) / 1e3 for name, ms in _STAGE.findall(timing)})


@contextmanager
def run_speech_service(bundle: Path, log: Path, *, library: Path | None, num_ranks: int = 0) -> Iterator[SpeechService]:
    """Run our service with this bundle alone until the block ends; all other settings are the default ones.

    Args:
        bundle: its folder.
        log: file for what it writes; folders are made.
        library: of the native kernel; None lets programs run their portable bodies.
        num_ranks: processes that share a long recording.
    Raises: RuntimeError if it does not start, or another kernel runs than was asked for.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    manifest = open_bundle(bundle).manifest
    with tempfile.TemporaryDirectory() as folder, log.open("w") as file:
        served = Path(folder) / "bundles"
        served.mkdir()
        (served / bundle.name).symlink_to(bundle.resolve())
        settings = {
            "SERVICE_BUNDLES": str(served),
            "SERVICE_CACHE": str(CACHE.resolve()),
            "SERVICE_DEVICE": "cpu",
            "SERVICE_PORT": "0",
            "SERVICE_RANKS": str(num_ranks),
            "SERVICE_REQUEST_TIMEOUT_SECONDS": str(REQUEST_SECONDS),
        } | ({"SERVICE_NATIVE_LIBRARY": str(library.resolve())} if library else {})
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SERVICE_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            cwd=folder,  # where no build/native lies that the service would find by itself
            env={**kept, **settings, "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            address = _wait_for_start(process, log)
            kernel = _read_kernel(address)
            if library and manifest.spec.get("has_clusters", True) and kernel != "native":
                raise RuntimeError(f"{library} does not load; see {log}")
            path = f"/v1/{SPEECH_RECOGNITION.name}/{manifest.name}"
            yield SpeechService(address, path, process.pid, kernel)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def reset_peak(process_id: int) -> None:
    """Let the count of a process's most resident memory begin again."""
    Path(f"/proc/{process_id}/clear_refs").write_text("5")  # man 5 proc_pid_clear_refs


def read_memory(process_id: int) -> Memory:
    """Read a process's resident memory."""
    status = Path(f"/proc/{process_id}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
    return Memory(current=int(found["VmRSS"]) * 1024, peak=int(found["VmHWM"]) * 1024)


def _wait_for_start(process: "subprocess.Popen[bytes]", log: Path) -> Address:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if found := _STARTED.search(log.read_text()):
            return found[1], int(found[2])
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start; see {log}")


def _read_kernel(address: Address) -> str:
    connection = http.client.HTTPConnection(*address, timeout=START_SECONDS)
    try:
        connection.request("GET", "/v1/models")
        (model,) = json.loads(connection.getresponse().read())["data"]
        return str(model["kernel"])
    finally:
        connection.close()
