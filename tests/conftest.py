"""Fixtures of more than one folder of tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden_files import REPOSITORY


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder with the pictures of the README's examples."""
    return REPOSITORY / "samples"


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """Gives the path of a file below `../shared`, or skips the test that asks for one that is not there."""

    def find(name: str) -> Path:
        path = REPOSITORY.parent / "shared" / name
        if not path.exists():
            pytest.skip(f"needs ../shared/{name}, which is not part of the repository")
        return path

    return find


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests that are coroutines, marked `anyio`, run on asyncio's own event loop."""
    return "asyncio"
