"""A natural recording for golden vectors and parity, from `samples/`, so that exports need no data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from service.sample import Sample
from service.tasks.audio import decode_audio
from service.tasks.log_mel import log_mel
from service.tasks.speech_recognition import SPEECH_RECOGNITION, SpeechRecognitionSpec

SAMPLES = Path("samples")
RECORDING = "speech_an4_valid.flac"
SEED = 7
MIN_PART_SECONDS = 0.4  # about a word
LOUDNESS = (0.3, 1.0)


def read_recording(spec: SpeechRecognitionSpec) -> Sample:
    """Decode the sample recording as the service does."""
    return SPEECH_RECOGNITION.decode((SAMPLES / RECORDING).read_bytes(), "audio/flac", spec)


def cut_recordings(spec: SpeechRecognitionSpec, seconds: Sequence[float], *, seed: int = SEED) -> list[Sample]:
    """Join random excerpts of the sample recording, each at a loudness of its own, to recordings of these lengths.

    Args:
        spec: of the task; lengths are brought into its limits.
        seconds: of each recording.
        seed: of the excerpts; the same one gives the same recordings.
    Returns: what the service would make of them, without context.
    """
    rng = np.random.default_rng(seed)
    recording, rate = decode_audio((SAMPLES / RECORDING).read_bytes(), spec), spec.sample_rate_hz
    found = []
    for wanted in seconds:
        num_samples = round(min(max(wanted, spec.min_seconds), spec.max_seconds) * rate)
        parts, num_joined = [], 0
        while num_joined < num_samples:
            length = int(rng.integers(min(round(MIN_PART_SECONDS * rate), len(recording)), len(recording) + 1))
            start = int(rng.integers(len(recording) - length + 1))
            parts.append(recording[start : start + length] * np.float32(rng.uniform(*LOUDNESS)))
            num_joined += length
        features = log_mel(np.concatenate(parts)[:num_samples], spec.features, sample_rate_hz=rate)
        found.append(Sample({"features": features}, length=len(features), context=None))
    return found
