import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import recording_lengths
from benchmarks.recording_lengths import Contestant, Gap, Point, find_obstacle, measure_lengths
from benchmarks.speech_service import NoAnswer
from tests.benchmarks.recordings import FakeService, count_seconds, fake_runs, make_recording

POINT = Point(
    contestant="full",
    length=10.0,
    recording_seconds=8.0,
    seconds=2.0,
    cpu_seconds=1.9,
    stages={"run": 1.5},
    idle_bytes=100,
    peak_bytes=1_100,
    num_errors=3,
    num_words=12,
)
UTTERANCES = [make_recording(0.25, "A", seed=1), make_recording(0.25, "B", seed=2)]
LINEAR = Contestant(name="linear", bundle=Path("clustered"), library=None, lengths=(0.5, 1.0, 2.0), memory_exponent=1)
SQUARE = Contestant(name="square", bundle=Path("full"), library=None, lengths=(0.5, 1.0), memory_exponent=2)


def test_a_point_counts_from_what_the_idle_process_has() -> None:
    assert POINT.real_time_factor == 0.25
    assert POINT.added_bytes == 1_000


@pytest.mark.parametrize(
    ("exponent", "available", "is_fitting"), [(1, 2_600, True), (1, 2_400, False), (2, 5_100, True), (2, 4_900, False)]
)
def test_memory_is_foretold_from_the_last_length(exponent: int, available: int, is_fitting: bool) -> None:
    """Twice the length takes 2,000 or 4,000 bytes, which must be 80 % of the available ones."""
    earlier = replace(POINT, recording_seconds=1.0)
    reason = find_obstacle([earlier, POINT], 16.0, exponent, available=available)
    assert (reason is None) == is_fitting


def test_of_the_first_length_nothing_is_foretold() -> None:
    assert find_obstacle([], 1e9, 2, available=1) is None


def test_contestants_take_turns_at_each_length_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    asked: list[float] = []

    def hear(audio: bytes) -> str:
        asked.append(count_seconds(audio))
        return "A"

    monkeypatch.setattr(recording_lengths, "run_speech_service", fake_runs(FakeService(hear, os.getpid()), started))
    points, gaps = measure_lengths([LINEAR, SQUARE], UTTERANCES, Path("log"))
    assert [str(path) for path in started] == ["clustered", "full", "clustered", "full", "clustered"]
    assert asked == [0.25, 0.5, 0.25, 0.5, 0.25, 1.0, 0.25, 1.0, 0.25, 2.0], "a short one before each, not counted"
    assert [(point.contestant, point.length, point.num_errors, point.num_words) for point in points] == [
        ("linear", 0.5, 1, 2),
        ("square", 0.5, 1, 2),
        ("linear", 1.0, 3, 4),
        ("square", 1.0, 3, 4),
        ("linear", 2.0, 7, 8),
    ]
    # Linux counts to within some pages for each thread.
    assert all(0 < point.idle_bytes < point.peak_bytes + 2e6 for point in points)
    assert gaps == []


def test_a_contestant_that_failed_is_not_asked_for_more_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []

    def hear(audio: bytes) -> str:
        if started[-1] == LINEAR.bundle and count_seconds(audio) == 1.0:
            raise NoAnswer("the service answered 500: no memory")
        return "A"

    monkeypatch.setattr(recording_lengths, "run_speech_service", fake_runs(FakeService(hear, os.getpid()), started))
    points, gaps = measure_lengths([LINEAR, SQUARE], UTTERANCES, Path("log"))
    assert [(point.contestant, point.length) for point in points] == [("linear", 0.5), ("square", 0.5), ("square", 1.0)]
    assert gaps == [
        Gap("linear", 1.0, "the service answered 500: no memory"),
        Gap("linear", 2.0, "as at 1 s"),
    ]
    assert len(started) == 4


def test_a_length_without_memory_for_it_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    service = FakeService(lambda _: "A", os.getpid())
    monkeypatch.setattr(recording_lengths, "run_speech_service", fake_runs(service, started))
    monkeypatch.setattr(recording_lengths, "read_available_bytes", lambda: -1)
    points, gaps = measure_lengths([SQUARE], UTTERANCES, Path("log"))
    assert [point.length for point in points] == [0.5]
    assert [gap.length for gap in gaps] == [1.0]
    assert "are available" in gaps[0].reason
    assert len(started) == 1
