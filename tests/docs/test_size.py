"""Holds the repository to its size: a clone stays quick, and trained weights find room."""

from tests.docs.repository import repository_files
from tests.golden_files import REPOSITORY

MAX_TOTAL_BYTES = 48_000_000
MAX_FILE_BYTES = 12_000_000


def test_all_files_together_stay_under_the_limit() -> None:
    assert sum(path.stat().st_size for path in repository_files()) < MAX_TOTAL_BYTES


def test_each_file_stays_under_the_limit() -> None:
    large = [path for path in repository_files() if path.stat().st_size > MAX_FILE_BYTES]
    assert [str(path.relative_to(REPOSITORY)) for path in large] == []
