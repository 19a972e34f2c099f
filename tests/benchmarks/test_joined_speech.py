import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from benchmarks.joined_speech import Recording, group_by_speaker, join, join_up_to, read_utterances
from tests.benchmarks.recordings import RATE, count_seconds, encode, make_recording


def decode(audio: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(audio), dtype="int16")[0]


def test_utterances_are_read_in_the_order_of_the_file_with_their_real_lengths(tmp_path: Path) -> None:
    first, second = make_recording(0.25, "B C", speaker="x"), make_recording(0.5, "D", speaker="y")
    columns = {
        "speaker": ["x", "y"],
        "text": ["B C", "D"],
        "num_samples": [4000, 8000],
        "sampling_rate": [RATE, RATE],
        "audio": [first.audio, second.audio],
        "duration_s": [0.3, 0.5],  # rounded: not to be used
    }
    (tmp_path / "speech_recognition").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "speech_recognition" / "an4_valid.parquet")
    assert read_utterances(tmp_path, "valid") == [first, second]


def test_a_joined_recording_is_its_parts_sample_by_sample() -> None:
    parts = [make_recording(0.25, "A B", seed=1), make_recording(0.5, "C", seed=2), make_recording(0.125, "D", seed=3)]
    joined = join(parts)
    assert joined.text == "A B C D"
    assert joined.seconds == 0.875
    np.testing.assert_array_equal(decode(joined.audio), np.concatenate([decode(part.audio) for part in parts]))


def test_recordings_of_different_rates_are_not_joined() -> None:
    other = Recording("one", "A", 1.0, encode(np.zeros(8_000, np.int16), 8_000))
    with pytest.raises(ValueError, match=r"recordings of \[8000, 16000\] Hz"):
        join([make_recording(0.25), other])


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "A"), (0.74, "A"), (0.75, "A B"), (1.5, "A B A B"), (1.8, None)])
def test_whole_utterances_are_repeated_up_to_the_length(seconds: float, text: str | None) -> None:
    joined = join_up_to([make_recording(0.25, "A", seed=1), make_recording(0.5, "B", seed=2)], seconds)
    assert joined.text == (text or "A B A B A")
    assert seconds - 0.5 < joined.seconds == count_seconds(joined.audio) <= seconds


def test_an_utterance_longer_than_the_recording_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the first utterance has 0\.5 s; at most 0\.4 s"):
        join_up_to([make_recording(0.5)], 0.4)


def test_speakers_keep_the_order_of_their_utterances() -> None:
    parts = [make_recording(0.1, text, speaker=text[0]) for text in ("b1", "a1", "b2", "a2", "b3")]
    assert {name: [one.text for one in own] for name, own in group_by_speaker(parts).items()} == {
        "b": ["b1", "b2", "b3"],
        "a": ["a1", "a2"],
    }
