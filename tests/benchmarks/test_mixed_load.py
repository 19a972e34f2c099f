import os
import time
from collections.abc import Sequence

import pytest

from benchmarks import mixed_load
from benchmarks.load import Outcome, Stretch
from benchmarks.mixed_load import measure_mixed, repeat
from benchmarks.speech_service import NoAnswer
from tests.benchmarks.recordings import FakeService


def test_calls_go_on_until_the_block_ends_and_the_last_one_is_waited_for() -> None:
    number = 0

    def send() -> float:
        nonlocal number
        number += 1
        time.sleep(0.001)
        return float(number)

    with repeat(send) as found:
        end = time.monotonic() + 60
        while len(found) < 3 and time.monotonic() < end:
            time.sleep(0.001)
    assert len(found) >= 3
    assert found == [float(index) for index in range(1, number + 1)]


def test_a_failed_call_ends_the_measurement() -> None:
    def fail() -> float:
        raise NoAnswer("gone")

    with pytest.raises(NoAnswer, match="gone"), repeat(fail):
        pass


def test_short_recordings_take_turns_alone_and_beside_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def hear(audio: bytes) -> str:
        sent.append(audio)
        time.sleep(0.001)
        return ""

    def drive(address: object, requests: Sequence[bytes], *, num_connections: int, stretch: Stretch) -> Outcome:
        assert list(requests) == [b"POST a", b"POST b"]
        assert stretch.seconds == 4.0
        return Outcome(latencies=[0.01 * (1 + number) for number in range(20)], num_errors=1, seconds=4.0)

    monkeypatch.setattr(mixed_load, "closed_loop", drive)
    windows = measure_mixed(FakeService(hear, os.getpid()), [b"a", b"b"], b"long", num_rounds=2, seconds=4.0)
    assert [(window.round, window.has_long) for window in windows] == [(0, False), (0, True), (1, False), (1, True)]
    assert [bool(window.long_seconds) for window in windows] == [False, True, False, True]
    assert set(sent) == {b"long"}
    assert len(sent) == sum(len(window.long_seconds) for window in windows), "the last answer is in the list"
    assert {(window.num_answers, window.num_errors) for window in windows} == {(20, 1)}
    assert windows[0].p50_seconds == pytest.approx(0.10)
    assert windows[0].p95_seconds == pytest.approx(0.19)


def test_a_window_without_an_answer_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_load, "closed_loop", lambda *_, **__: Outcome(seconds=4.0))
    with pytest.raises(NoAnswer, match="no short recording got an answer within 4 s"):
        measure_mixed(FakeService(lambda _: "", os.getpid()), [b"a"], b"long", num_rounds=1, seconds=4.0)
