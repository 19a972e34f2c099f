from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attention_scaling import YARDSTICK, Plan, Point, measure_scaling, plot_scaling, render_scaling
from benchmarks.attention_worker import make_inputs
from tests.export.conftest import quiet_exporter
from tests.export.native_operator import NEEDS_COMPILER


def point(contestant: str, num_tokens: int, **found: Any) -> Point:
    facts = {"cpu_seconds": 0.01, "wall_seconds": 0.01, "peak_bytes": 5_000_000, "to_full": None} | found
    return Point(contestant=contestant, num_tokens=num_tokens, **facts)


POINTS = [
    point(YARDSTICK, 1024, to_full=1.0),
    point("improved, kernel", 1024, cpu_seconds=0.0031, to_full=0.31),
    point("improved, kernel", 2048, cpu_seconds=0.0062, peak_bytes=0),
]


def test_the_table_has_ratios_where_full_attention_was_measured() -> None:
    text = render_scaling(POINTS)
    assert "| contestant | N = 1024 | N = 2048 |\n|---|---|---|" in text
    assert f"| {YARDSTICK} | 10.0 |  |" in text
    assert "| improved, kernel | 3.1 (0.310) | 6.2 |" in text
    assert "| improved, kernel | 5 | 0 |" in text


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot_scaling(POINTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_equal_inputs_for_all() -> None:
    first, second = make_inputs(8), make_inputs(8)
    assert first["q"].shape == (1, 8, 8, 64)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["q"], first["k"])


@NEEDS_COMPILER
def test_every_contestant_is_measured(tmp_path: Path) -> None:
    with quiet_exporter():
        points = measure_scaling(tmp_path, Plan(sizes=(256,), rounds=1, repeats=1))
    assert len({found.contestant for found in points}) == 6
    for found in points:
        assert found.cpu_seconds > 0, found
        # Scores of full attention alone have 8 · 256² numbers of 4 bytes, unless they are computed block by block.
        assert 0 <= found.peak_bytes < 50_000_000, found
    assert next(found.to_full for found in points if found.contestant == YARDSTICK) == 1.0
