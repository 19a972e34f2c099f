"""Recordings of noise, and a service that hears in them whatever a test wants."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.joined_speech import Recording
from benchmarks.speech_service import Transcript

RATE = 16_000


def make_recording(seconds: float, text: str = "A", *, speaker: str = "one", seed: int = 0) -> Recording:
    """Noise as FLAC."""
    samples = np.random.default_rng(seed).integers(-9_000, 9_000, round(seconds * RATE)).astype(np.int16)
    return Recording(speaker, text, seconds, encode(samples, RATE))


def encode(samples: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def count_seconds(audio: bytes) -> float:
    return soundfile.info(io.BytesIO(audio)).duration


class FakeService:
    """Answers in no time.

    Args:
        hear: recording → text; may raise.
        process_id: whose memory is read.
    """

    def __init__(self, hear: Callable[[bytes], str], process_id: int) -> None:
        self._hear, self.process_id = hear, process_id
        self.address = ("nowhere", 0)

    def build_request(self, audio: bytes) -> bytes:
        return b"POST " + audio

    def transcribe(self, audios: Sequence[bytes]) -> list[Transcript]:
        return [Transcript(self._hear(audio), 2.0, {"run": 1.5}) for audio in audios]


def fake_runs(service: FakeService, started: list[Path]) -> Callable[..., object]:
    """What stands for `run_speech_service`: notes the bundle and gives the service."""

    @contextmanager
    def run(bundle: Path, log: Path, *, library: Path | None) -> Iterator[FakeService]:
        started.append(bundle)
        yield service

    return run
