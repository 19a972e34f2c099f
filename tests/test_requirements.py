"""Holds requirements/ to its promises: every package is pinned, and serving needs no torch."""

import re
from pathlib import Path

from tests.golden_files import REPOSITORY

REQUIREMENTS = REPOSITORY / "requirements"


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def packages(path: Path) -> set[str]:
    return {re.split(r"[\[;=]", line)[0].strip() for line in lines(path) if not line.startswith("-r")}


def pins() -> dict[str, str]:
    return dict(line.split("==") for line in lines(REQUIREMENTS / "constraints.txt"))


def test_every_requirement_is_pinned() -> None:
    for path in REQUIREMENTS.glob("*.txt"):
        assert packages(path) <= pins().keys(), path.name


def test_pins_name_no_local_version() -> None:
    assert [name for name, version in pins().items() if "+" in version] == []


def test_both_builds_of_onnx_runtime_have_one_version() -> None:
    assert pins()["onnxruntime"] == pins()["onnxruntime-gpu"]


def test_serving_asks_for_no_torch() -> None:
    for path in REQUIREMENTS.glob("serve*.txt"):
        assert "torch" not in packages(path), path.name
