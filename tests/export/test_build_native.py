import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from export import build_native as build_module
from export.build_native import LIBRARY, build_native
from service.runtimes import native
from service.runtimes.native import find_native_library
from tests.export.native_operator import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER


@pytest.fixture
def num_compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts calls of the compiler that make a library; an empty file stands for it."""
    counts = [0]
    original = subprocess.run

    def fake(command: list[str], **kwargs: Any) -> Any:
        if "--version" in command:
            return original(command, **kwargs)
        counts[0] += 1
        Path(command[command.index("-o") + 1]).write_bytes(b"")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake)
    return counts


def test_a_library_is_compiled_once(tmp_path: Path, num_compilations: list[int]) -> None:
    first = build_native(tmp_path)
    assert first.name == LIBRARY
    assert first.parent.parent == tmp_path
    assert build_native(tmp_path) == first
    assert num_compilations == [1]
    assert [path.name for path in first.parent.iterdir()] == [LIBRARY]


def test_other_flags_or_sources_are_another_library(
    tmp_path: Path, num_compilations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = {build_native(tmp_path), build_native(tmp_path, sanitize=True)}
    shutil.copytree(build_module.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(build_module, "SOURCES", tmp_path / "sources")
    assert build_native(tmp_path) in libraries  # wherever they lie
    with (tmp_path / "sources" / "matrix.inc").open("a") as file:
        file.write("\n")
    libraries.add(build_native(tmp_path))
    assert len(libraries) == 3
    assert num_compilations == [3]


def test_without_a_compiler_there_is_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"found no g\+\+ .* apt-get install g\+\+"):
        build_native(tmp_path)


def test_a_failed_compilation_says_what_the_compiler_said_and_leaves_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "broken.cpp").write_text("int f() { return nothing; }\n")
    monkeypatch.setattr(build_module, "SOURCES", tmp_path / "sources")
    with pytest.raises(RuntimeError, match=r"failed; GCC 9 or later is needed:\n(.*\n)*.*.nothing. was not declared"):
        build_native(tmp_path / "out")
    assert list((tmp_path / "out").rglob(LIBRARY)) == []


@pytest.mark.usefixtures("num_compilations")
def test_the_service_finds_a_build_but_never_a_sanitized_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BUILDS", tmp_path)
    build_native(tmp_path, sanitize=True)
    assert find_native_library(None) is None
    library = build_native(tmp_path)
    assert find_native_library(None) == library
