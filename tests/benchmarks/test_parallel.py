from pathlib import Path

import pytest

from benchmarks.parallel import (
    NUM_RANKS,
    QUICK,
    SIZES,
    Measured,
    assert_counted,
    assignment,
    formula,
    plot_parallel,
    render_parallel,
)
from benchmarks.parallel_worker import Finding, Job


def found(job: Job, forward_bytes: int, *, assignment_bytes: int = 0, peak_bytes: int = 10**6) -> Finding:
    return Finding(
        job=job,
        assignment_bytes=assignment_bytes,
        forward_bytes=forward_bytes,
        backward_bytes=0,
        peak_bytes=peak_bytes,
        wall_seconds=1.0,
    )


def test_a_clustered_step_sends_an_eighth_of_ulysses_and_the_same_at_every_length() -> None:
    sent = [formula("clustered", size, NUM_RANKS) for size in SIZES]
    assert len(set(sent)) == 1
    assert sent[0].forward / formula("Ulysses", 8192, NUM_RANKS).forward <= 0.13


def test_a_count_that_is_not_the_formulas_is_an_error() -> None:
    job = Job(way="clustered", length=8192)
    agreed = 3 * 8 * 9
    right = formula("clustered", 8192, 4).forward + agreed
    assigned = assignment(8192, 4) + agreed
    assert_counted(found(job, right, assignment_bytes=assigned), 4)
    with pytest.raises(AssertionError, match="the formulas say"):
        assert_counted(found(job, right + 1, assignment_bytes=assigned), 4)


def test_the_tables_mark_what_was_counted_and_the_plot_is_drawn(tmp_path: Path) -> None:
    job = Job(way="recogniser", length=1000)
    held = {1: [found(job, 0, peak_bytes=4 * 10**6)], 4: [found(job, 0, peak_bytes=10**6)]}
    measured = Measured(counted=[found(Job(way="ring", length=16384), 1)], held=held)
    text = render_parallel(measured)
    assert "| ring, forward | 25.166 | 50.332* |" in text
    assert text.count("*") == 2
    assert "| recogniser, clustered, N = 1000 | 4 (1.00) | 1 (0.25) |" in text
    plot_parallel(measured, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000


def test_a_quick_plan_runs_every_way() -> None:
    assert {job.way for job in (*QUICK.counted, *QUICK.held)} == {
        "Ulysses",
        "ring",
        "USP",
        "clustered",
        "segment-local",
        "recogniser",
    }
