"""A corpus of two words, each a tone: enough to learn from in a few seconds."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from models.ctc_transformer import CtcTransformerConfig
from service.tasks.audio import AudioSpec
from service.tasks.log_mel import LogMelSpec
from training.speech_augmentation import SpeechAugmentation
from training.speech_recognition import SpeechRecognition

RATE_HZ = 8_000
TONES = {"A": 400.0, "B": 1_500.0}
MODEL = CtcTransformerConfig(
    num_layers=1, dim=32, num_heads=2, hidden_dim=64, num_mels=20, stem_channels=4, dropout=0.0
)

PROBLEM = SpeechRecognition(
    labels=("", " ", "A", "B"),
    train_file="train.parquet",
    valid_file="test.parquet",
    test_file="test.parquet",
    audio=AudioSpec(sample_rate_hz=RATE_HZ, min_seconds=0.1, max_seconds=20.0),
    log_mel=LogMelSpec(num_mels=20, fft_size=256, high_hz=4000.0),
    mean=-4.0,
    std=4.0,
    subsampling=2,
    speeds=(1.0, 1.1),
    join_sizes=(1, 4),
    augmentation=SpeechAugmentation(level=0.1, num_band_masks=1, band_mask=2, time_masks_per_second=1.0, time_mask=3),
)


def say(text: str, rng: np.random.Generator, tones: Mapping[str, float] = TONES) -> bytes:
    """A tone of 0.2 s for each word, and as much silence between."""
    time = np.arange(RATE_HZ // 5) / RATE_HZ
    silence = np.zeros(len(time))
    parts = [part for word in text.split() for part in (np.sin(2 * np.pi * tones[word] * time), silence)]
    samples = 0.5 * np.concatenate([silence, *parts]) + 0.001 * rng.standard_normal(len(time) * (len(parts) + 1))
    file = io.BytesIO()
    soundfile.write(file, samples, RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def write_corpus(folder: Path, most_words: int) -> Path:
    rng = np.random.default_rng(0)
    for name, num in (("train", 32), ("test", 8)):
        texts = [" ".join(rng.choice(["A", "B"], rng.integers(1, most_words + 1))) for _ in range(num)]
        audio = [say(text, rng) for text in texts]
        pq.write_table(pa.table({"audio": audio, "text": texts}), folder / f"{name}.parquet")
    return folder
