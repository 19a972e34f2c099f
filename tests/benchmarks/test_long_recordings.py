import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import pytest

from benchmarks import long_recordings
from benchmarks.joined_speech import Recording
from benchmarks.long_recordings import Cell, Plan, list_children, measure_long_recordings, render_long_recordings
from service.bundle import Bundle

ORDINARY = Cell(
    bundle_sha256="ab",
    recording_seconds=599.4,
    num_ranks=0,
    text="ONE TWO THREE",
    seconds=11.0,
    run_seconds=8.5,
    cpu_seconds=5.4,
    service_peak_bytes=640_000_000,
    rank_peak_bytes=(),
    sent_bytes=0,
    waiting_seconds=0,
)
SHARED = replace(
    ORDINARY, num_ranks=2, text="ONE TEN", rank_peak_bytes=(7_000_000, 9_000_000), sent_bytes=2e6, waiting_seconds=3.0
)


def test_each_row_tells_of_one_cell() -> None:
    *_, first, second = render_long_recordings([ORDINARY, SHARED], "tiny 1.0.0").splitlines()
    assert first == "| 599 | none | 3 | 0 | 11.0 | 8.5 | 5.4 | 640 | | | |"
    assert second == "| 599 | 2 | 2 | 2 | 11.0 | 8.5 | 5.4 | 640 | 9 | 2.0 | 1.5 |"


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    class FakeBundle:
        sha256 = "ab"

    def measure(bundle: Bundle, recording: Recording, log: Path, *, num_ranks: int) -> Cell:
        sent.append(num_ranks)
        return replace(SHARED, num_ranks=num_ranks, bundle_sha256=bundle.sha256)

    monkeypatch.setattr(long_recordings, "read_utterances", lambda *_: [])
    monkeypatch.setattr(long_recordings, "join_up_to", lambda *_: None)
    monkeypatch.setattr(long_recordings, "measure_cell", measure)
    bundle = cast("Bundle", FakeBundle())
    (tmp_path / "600-seconds-1-ranks.json").write_text(json.dumps(asdict(replace(ORDINARY, bundle_sha256="older"))))
    plan = Plan(num_ranks={600.0: (1, 2)})
    cells = measure_long_recordings(bundle, tmp_path, tmp_path, plan)
    assert sent == [1, 2]
    assert measure_long_recordings(bundle, tmp_path, tmp_path, plan) == cells
    assert sent == [1, 2]


def test_children_of_a_process_are_found() -> None:
    script = "import subprocess as s, sys; c = s.Popen(['sleep', '60']); print(c.pid, flush=True); c.wait()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert list_children(process.pid) == [child]
        subprocess.run(["kill", str(child)], check=True)
