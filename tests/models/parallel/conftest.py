from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.models.parallel.ranks import Ranks

Run = Callable[..., list[Any]]


@pytest.fixture(scope="package")
def _worlds() -> Iterator[dict[int, Ranks]]:
    worlds: dict[int, Ranks] = {}
    yield worlds
    for ranks in worlds.values():
        ranks.close()


@pytest.fixture
def run_ranks(_worlds: dict[int, Ranks]) -> Run:
    """Runs a function of `cases` on so many ranks; gives what each returned."""

    def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if size not in _worlds:
            _worlds[size] = Ranks(size)
        try:
            return _worlds[size].run(function, *args)
        except AssertionError:
            _worlds.pop(size).close()  # its messages may be out of step
            raise

    return run


@pytest.fixture
def fresh_ranks() -> Iterator[Callable[[int], Ranks]]:
    """Starts ranks that a test may end."""
    started: list[Ranks] = []

    def start(size: int) -> Ranks:
        started.append(Ranks(size))
        return started[-1]

    yield start
    for ranks in started:
        ranks.close()
