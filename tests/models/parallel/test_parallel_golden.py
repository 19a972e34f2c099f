"""Sequence-parallel attention on as many ranks as each golden file says, every rank's share compared."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.golden_files import golden_files
from tests.models.parallel import cases
from tests.models.parallel.conftest import Run

SYSTEM = "sequence_parallelism"
TOLERANCE = 1e-5  # of the largest expected number, of 1 at least; the golden README's


def dense_files() -> list[Path]:
    return golden_files(SYSTEM, "p", "uneven")


def clustered_files() -> list[Path]:
    return golden_files(SYSTEM, "clustered_")


def num_ranks(path: Path) -> int:
    meta, _ = cases.read_golden(path)
    if "P" in meta:
        return int(meta["P"])
    named = re.search(r"_P(\d+)|(?:^|_)p(\d+)", path.stem)
    assert named, f"{path.name} tells no number of ranks"
    return int(named[1] or named[2])


def has_shards(path: Path) -> bool:
    with np.load(path) as file:
        return "rank0.q" in file.files


def check(errors_by_rank: list[cases.Errors]) -> None:
    assert all(errors_by_rank)
    beyond = [{name: e for name, e in errors.items() if not e <= TOLERANCE} for errors in errors_by_rank]
    assert not any(beyond), beyond


@pytest.mark.parametrize("path", dense_files(), ids=lambda path: path.stem)
def test_golden_outputs_and_gradients_of_parallel_attention_are_reproduced(path: Path, run_ranks: Run) -> None:
    check(run_ranks(num_ranks(path), cases.golden_shards if has_shards(path) else cases.golden_whole, path))


@pytest.mark.parametrize("path", clustered_files(), ids=lambda path: path.stem)
def test_golden_outputs_and_gradients_of_parallel_clusters_are_reproduced(path: Path, run_ranks: Run) -> None:
    check(run_ranks(num_ranks(path), cases.golden_clustered, path))
