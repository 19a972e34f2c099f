"""Recordings to send: the utterances of CMU AN4, alone or joined to recordings of any length, with what was said."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import soundfile

FILES = "speech_recognition/an4_{split}.parquet"


@dataclass(frozen=True)
class Recording:
    """A file and its transcript.

    Attributes:
        speaker: who talks; of several speakers the first.
        text: what is said.
        seconds: its length.
        audio: the file, FLAC.
    """

    speaker: str
    text: str
    seconds: float
    audio: bytes


def read_utterances(data: Path, split: str) -> list[Recording]:
    """Read the utterances of a split, in the order of the file.

    Args:
        data: folder of all data sets.
        split: "train", "valid" or "test_dev".
    """
    columns = ["speaker", "text", "num_samples", "sampling_rate", "audio"]
    rows = pq.read_table(data / FILES.format(split=split), columns=columns).to_pylist()
    return [
        Recording(row["speaker"], row["text"], row["num_samples"] / row["sampling_rate"], row["audio"]) for row in rows
    ]


def group_by_speaker(utterances: Sequence[Recording]) -> dict[str, list[Recording]]:
    """Group utterances: speaker → utterances, both in the order given."""
    found: dict[str, list[Recording]] = {}
    for utterance in utterances:
        found.setdefault(utterance.speaker, []).append(utterance)
    return found


def join(utterances: Sequence[Recording]) -> Recording:
    """Join recordings as they are, without pauses.

    Raises: ValueError if their sample rates differ.
    """
    decoded = {utterance: _decode(utterance.audio) for utterance in set(utterances)}
    rates = {rate for _, rate in decoded.values()}
    if len(rates) != 1:
        raise ValueError(f"recordings of {sorted(rates)} Hz; one rate was expected; resample them")
    (rate,) = rates
    samples = np.concatenate([decoded[utterance][0] for utterance in utterances])
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    text = " ".join(utterance.text for utterance in utterances)
    return Recording(utterances[0].speaker, text, len(samples) / rate, file.getvalue())


def join_up_to(utterances: Sequence[Recording], seconds: float) -> Recording:
    """Join whole utterances, from the first on again when all were used, to the longest recording that fits.

    Args:
        utterances: to be taken in turn.
        seconds: which the recording does not exceed.
    Raises: ValueError if the first is longer.
    """
    parts: list[Recording] = []
    total = 0.0
    while total + (following := utterances[len(parts) % len(utterances)]).seconds <= seconds:
        parts.append(following)
        total += following.seconds
    if not parts:
        raise ValueError(f"the first utterance has {utterances[0].seconds:g} s; at most {seconds:g} s were asked for")
    return join(parts)


def _decode(audio: bytes) -> tuple[npt.NDArray[np.int16], int]:
    samples, rate = soundfile.read(io.BytesIO(audio), dtype="int16")
    return samples, rate
