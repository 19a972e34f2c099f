"""Holds the picture of the layers in CONTRIBUTING.md to the contracts of pyproject.toml."""

import re
import tomllib

import pytest

from tests.docs.repository import document
from tests.golden_files import REPOSITORY


def contract(package: str) -> list[list[str]]:
    """The layers of a package, the uppermost first; a name in parentheses may be absent."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(one["layers"] for one in settings["tool"]["importlinter"]["contracts"] if one["id"] == package)
    return [[name.strip("() ") for name in layer.split("|")] for layer in layers]


@pytest.mark.parametrize("package", ["service", "models"])
def test_the_picture_shows_the_contract(package: str) -> None:
    found = re.search(rf"^{package}: +(.*?)(?=^\S)", document("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL)
    assert found, f"CONTRIBUTING.md has no picture of {package}"
    assert [[name.strip() for name in layer.split("|")] for layer in found[1].split("→")] == contract(package)
