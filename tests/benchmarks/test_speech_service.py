"""A real service with a recogniser that hears nothing but A."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speech_service import NoAnswer, SpeechService, read_memory, reset_peak, run_speech_service
from tests.benchmarks.recordings import make_recording
from tests.benchmarks.tiny_speech_bundle import NAME, write_speech_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech_bundle(tmp_path_factory.mktemp("bundles") / NAME)


@pytest.fixture(scope="module")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpeechService]:
    with run_speech_service(bundle, tmp_path_factory.mktemp("logs") / "log", library=None) as running:
        yield running
    with pytest.raises(ProcessLookupError):
        os.kill(running.process_id, 0)


def test_recordings_longer_than_a_socket_holds_are_transcribed_on_one_connection(service: SpeechService) -> None:
    long = make_recording(59.0).audio
    assert len(long) > 1 << 20
    answers = service.transcribe([make_recording(0.5).audio, long])
    assert [answer.text for answer in answers] == ["A", "A"]
    for answer in answers:
        assert answer.stages.keys() == {"decode", "queue", "run", "postprocess"}
        assert 0 < sum(answer.stages.values()) < answer.seconds


def test_without_a_library_the_portable_bodies_run(service: SpeechService) -> None:
    assert service.kernel == "portable"


@pytest.mark.parametrize(("audio", "fault"), [(b"no recording", "400"), (make_recording(61.0).audio, "at most 60 s")])
def test_a_refusal_is_no_transcript(service: SpeechService, audio: bytes, fault: str) -> None:
    with pytest.raises(NoAnswer, match=fault):
        service.transcribe([audio])


def test_nobody_there_is_no_transcript() -> None:
    with pytest.raises(NoAnswer, match="gave no answer"):
        SpeechService(("127.0.0.1", 1), "/", os.getpid(), "portable").transcribe([b""])


def test_a_service_that_does_not_start_names_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    folder = write_speech_bundle(tmp_path / NAME, task="mind-reading")
    with pytest.raises(RuntimeError, match="did not start"), run_speech_service(folder, log, library=None):
        pass
    assert "unknown task mind-reading" in log.read_text()


def test_the_most_memory_is_counted_anew() -> None:
    reset_peak(os.getpid())
    before = read_memory(os.getpid())
    large = np.ones(25_000_000)  # 200 MB
    during = read_memory(os.getpid())
    del large
    after = read_memory(os.getpid())
    assert during.peak - before.current > 190e6
    assert abs(after.peak - during.peak) < 2e6, "Linux counts to within some pages for each thread"
    assert during.peak > after.current + 150e6
    reset_peak(os.getpid())
    assert read_memory(os.getpid()).peak < during.peak - 150e6
