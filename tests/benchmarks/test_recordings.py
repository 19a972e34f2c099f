import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import mixed_load, recording_lengths, recordings
from benchmarks.__main__ import find_missing
from benchmarks.joined_speech import FILES
from benchmarks.load import Outcome
from benchmarks.recordings import BODY, FULL, KERNEL, Plan, find_recogniser, measure_recordings
from service.bundle import open_bundle
from tests.benchmarks.recordings import RATE, FakeService, count_seconds, fake_runs, make_recording
from tests.benchmarks.tiny_speech_bundle import NAME, write_speech_bundle
from tests.service.tiny_bundle import write_tiny_bundle

PLAN = Plan(
    kernel_lengths=(1.0, 2.0),
    body_lengths=(1.0,),
    full_lengths=(1.0, 2.0),
    long_length=3.0,
    num_rounds=1,
    window_seconds=0.1,
)
UTTERANCES = {  # test_dev has two speakers, one of them over 30 s
    "test_dev": [
        make_recording(20.0, "A B", speaker="x", seed=1),
        make_recording(16.0, "C", speaker="x", seed=2),
        make_recording(4.0, "D", speaker="y", seed=3),
    ],
    "valid": [make_recording(0.5, "E F", speaker="z", seed=4)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / FILES).parent.mkdir()
    for split, utterances in UTTERANCES.items():
        rows = [
            {"speaker": one.speaker, "text": one.text, "audio": one.audio}
            | {"num_samples": round(one.seconds * RATE), "sampling_rate": RATE}
            for one in utterances
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / FILES.format(split=split))
    return folder


def test_test_speakers_are_measured_and_long_recordings_are_made_of_valid(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(write_speech_bundle(tmp_path / NAME, quality={"test_dev": {"word_error_rate": 0.25}}))
    started: list[Path] = []
    asked: list[float] = []

    def hear(audio: bytes) -> str:
        asked.append(count_seconds(audio))
        return "A B"

    service = FakeService(hear, os.getpid())
    monkeypatch.setattr(recordings, "build_native", lambda: Path("library"))
    monkeypatch.setattr(recordings, "open_full_twin", lambda _, folder: folder)
    for module in (recordings, recording_lengths):
        monkeypatch.setattr(module, "run_speech_service", fake_runs(service, started))
    monkeypatch.setattr(mixed_load, "closed_loop", lambda *_, **__: Outcome(latencies=[0.1], seconds=0.1))
    # What this process takes while it pretends to serve says nothing about what would fit.
    monkeypatch.setattr(recording_lengths, "read_available_bytes", lambda: 1 << 60)
    found = measure_recordings(bundle, data, tmp_path, PLAN)
    assert (found.model, found.version, found.stated_error_rate) == (NAME, "1.2.3", 0.25)
    assert [(one.name, one.errors_alone, one.errors_joined) for one in found.speakers] == [("x", 2, 1), ("y", 2, None)]
    assert asked[:4] == [20.0, 16.0, 36.0, 4.0]
    assert [window.has_long for window in found.windows] == [False, True]
    assert 3.0 in asked[4:], "the recording beside which short ones are sent"
    assert {(point.contestant, point.length, point.num_words) for point in found.points} == {
        (KERNEL, 1.0, 4),
        (BODY, 1.0, 4),
        (FULL, 1.0, 4),
        (KERNEL, 2.0, 8),
        (FULL, 2.0, 8),
    }
    twin = tmp_path / f"{NAME}-full"
    assert started == [bundle.folder, bundle.folder, bundle.folder, twin, bundle.folder, twin]


def test_of_a_folder_of_bundles_the_default_recogniser_is_measured(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "a-picture-model")
    write_speech_bundle(tmp_path / "b-other", name="other", default=False)
    with pytest.raises(FileNotFoundError, match="the default for speech-recognition"):
        find_recogniser(tmp_path)
    chosen = write_speech_bundle(tmp_path / "c-chosen")
    assert find_recogniser(tmp_path).folder == chosen
    assert find_recogniser(tmp_path / "b-other").manifest.name == "other", "the bundle itself may be named"


def test_without_data_or_recogniser_the_subject_is_left_out(data: Path, tmp_path: Path) -> None:
    assert find_missing("recordings", tmp_path, data / "nowhere") == f"{data / 'nowhere'} is not here"
    assert "no bundle that is the default for speech-recognition" in (find_missing("recordings", tmp_path, data) or "")
    write_speech_bundle(tmp_path / NAME)
    assert find_missing("recordings", tmp_path, data) is None
    assert find_missing("serving", tmp_path, data / "nowhere") is None
