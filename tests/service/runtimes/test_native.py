import logging
import os
from pathlib import Path

import onnx
import pytest

from service.errors import BundleError
from service.runtimes import native
from service.runtimes.native import LIBRARY, find_native_library
from service.runtimes.onnx import OPERATORS, open_onnx
from tests.service.tiny_bundle import PROGRAM


def build(folder: Path, name: str, *, time: float) -> Path:
    library = folder / name / LIBRARY
    library.parent.mkdir()
    library.write_bytes(b"no library")
    os.utime(library, (time, time))
    return library


def test_the_newest_build_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BUILDS", tmp_path)
    assert find_native_library(None) is None
    build(tmp_path, "a", time=2.0)
    newest = build(tmp_path, "b", time=3.0)
    build(tmp_path, "c", time=1.0)
    assert find_native_library(None) == newest


def test_a_library_that_is_named_wins_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BUILDS", tmp_path)
    build(tmp_path, "a", time=1.0)
    other = tmp_path / "other.so"
    with pytest.raises(BundleError, match=r"SERVICE_NATIVE_LIBRARY names .*other.so.*make native"):
        find_native_library(other)
    other.write_bytes(b"")
    assert find_native_library(other) == other


def test_a_library_that_does_not_load_leaves_the_portable_bodies(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = onnx.load(tiny_bundle / PROGRAM)
    model.metadata_props.add(key=OPERATORS, value="clustered_attention.ClusteredAttention")
    onnx.save(model, tmp_path / PROGRAM)
    with caplog.at_level(logging.INFO):
        runtime = open_onnx(tmp_path / PROGRAM, device="cpu", native_library=build(tmp_path, "a", time=1.0))
    assert runtime.kernel == "portable"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "does not load" in caplog.text
    assert "portable bodies of clustered_attention.ClusteredAttention" in caplog.text
    runtime.close()


def test_a_program_without_our_operators_says_nothing_of_kernels(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        open_onnx(tiny_bundle / PROGRAM, device="cpu").close()
    assert not caplog.records
