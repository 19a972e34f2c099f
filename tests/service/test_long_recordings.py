"""Long recordings that are shared by ranks, over HTTP, with the recogniser that ships."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from service.bundle import MANIFEST
from tests.golden_files import REPOSITORY
from tests.service.server_process import HOST, PATIENCE_SECONDS, Reply, ServerProcess, ask, eventually

NAME, PATH = "ctc-transformer-small-an4", "/v1/speech-recognition"
SAMPLE = REPOSITORY / "samples" / "speech_an4_mcel.wav"
NUM_RANKS = 2
LONG_BUCKET = 5  # among the manifest's: some 7 s; what ships takes minutes

torch = pytest.importorskip("torch", reason="ranks need torch")


class Server(ServerProcess):
    def ranks(self) -> list[int]:
        """Processes of the ranks that run."""
        return [
            int(child)
            for task in Path(f"/proc/{self.process.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]

    def transcribe(self, audio: bytes) -> Reply:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=4 * PATIENCE_SECONDS)
        try:
            return ask(connection, "POST", PATH, audio)
        finally:
            connection.close()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recogniser, but for what counts as long."""
    folder = tmp_path_factory.mktemp("bundles")
    copy = shutil.copytree(REPOSITORY / "bundles" / NAME, folder / NAME)
    fields = json.loads((copy / MANIFEST).read_text())
    fields["long_length"] = fields["length_buckets"][LONG_BUCKET]
    (copy / MANIFEST).write_text(json.dumps(fields))
    return folder


def start(folder: Path, bundles: Path, cache: Path, *, ranks: int) -> Server:
    return Server(
        [sys.executable, "-m", "service"],
        folder=folder,
        patience_seconds=60.0,
        bundles=bundles,
        cache=cache,
        device="cpu",
        workers=2,
        ranks=ranks,
        request_timeout_seconds=120,
    )


@pytest.fixture(scope="module")
def server(bundles: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start(tmp_path_factory.mktemp("log"), bundles, cache, ranks=NUM_RANKS) as opened:
        yield opened


def repeat(times: int) -> bytes:
    """The sample, said so many times."""
    samples, rate = soundfile.read(SAMPLE, dtype="int16")
    file = io.BytesIO()
    soundfile.write(file, np.tile(samples, times), rate, format="WAV")
    return file.getvalue()


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return str(json.loads(reply.body)["text"])


def test_ranks_give_the_transcript_of_the_ordinary_program(
    server: Server, bundles: Path, cache: Path, tmp_path: Path
) -> None:
    long = repeat(4)
    sent = server.metric("inference_rank_sent_bytes_total")
    assert len(server.ranks()) == server.metric("inference_ranks_ready") == NUM_RANKS
    text_of(server.transcribe(repeat(1)))
    assert server.metric("inference_rank_sent_bytes_total") == sent  # it was short
    found = text_of(server.transcribe(long))
    assert server.metric("inference_rank_sent_bytes_total") > sent
    with start(tmp_path, bundles, cache, ranks=0) as ordinary:
        assert ordinary.ranks() == []
        assert text_of(ordinary.transcribe(long)) == found
        assert "SERVICE_RANKS is 0" in ordinary.log()
    assert len(found.split()) >= 20


def test_a_rank_that_is_killed_costs_its_recording_alone(server: Server) -> None:
    long, short = repeat(30), repeat(1)
    expected = text_of(server.transcribe(short))
    before = server.ranks()
    batches = server.metric("inference_batches_in_flight")
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(server.transcribe, long)
        eventually(lambda: server.metric("inference_batches_in_flight") > batches)
        os.kill(before[1], signal.SIGKILL)
        assert text_of(server.transcribe(short)) == expected
        reply = lost.result()
    assert reply.status == 503
    assert json.loads(reply.body)["code"] == "ranks_lost"
    assert int(reply.headers["retry-after"]) >= 1
    assert server.get("/health/ready").status == 200
    assert text_of(server.transcribe(short)) == expected
    eventually(lambda: server.metric("inference_ranks_ready") == NUM_RANKS, patience_seconds=60.0)
    after = server.ranks()
    assert len(after) == NUM_RANKS
    assert not set(before) & set(after)
    text_of(server.transcribe(repeat(4)))


def test_a_stop_answers_the_recording_in_hand_and_ends_the_ranks(server: Server) -> None:
    ranks = server.ranks()
    assert len(ranks) == NUM_RANKS
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(server.transcribe, repeat(10))
        eventually(lambda: server.metric("inference_batches_in_flight") > 0)
        server.send_signal(signal.SIGTERM)
        text_of(last.result())
    assert server.wait() == 0
    assert not any(_runs(rank) for rank in ranks)


def test_ranks_end_with_a_service_that_is_killed_amid_a_recording(bundles: Path, cache: Path, tmp_path: Path) -> None:
    with start(tmp_path, bundles, cache, ranks=NUM_RANKS) as server:
        ranks = server.ranks()
        assert len(ranks) == NUM_RANKS
        sender = threading.Thread(target=_send_in_vain, args=(server,))
        sender.start()
        eventually(lambda: server.metric("inference_batches_in_flight") > 0)
        server.send_signal(signal.SIGKILL)
        server.wait()
        eventually(lambda: not any(_runs(rank) for rank in ranks))
        sender.join()


def _send_in_vain(server: Server) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        server.transcribe(repeat(30))


def _runs(process_id: int) -> bool:
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return False
    return re.search(r"^State:\s+Z", status, re.MULTILINE) is None
