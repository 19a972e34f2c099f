import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import export.__main__ as command
from export.source import Source
from service.bundle import open_bundle


def run(monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, *arguments: str) -> list[Path]:
    """Run the command; gives the folders that it wrote to, in place of writing."""
    written: list[Path] = []

    def write(source: Source, model: Any, out: Path, *, runtimes: Sequence[str], precision: str) -> Any:
        assert precision == ("fp16" if "fp16" in arguments else "fp32")
        written.append(out)
        return open_bundle(bundle_folder).manifest

    monkeypatch.setattr(command, "write_bundle", write)
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    command.main()
    return written


def test_the_command_tells_where_the_bundle_lies_and_how_close_it_is(
    monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [str(bundle_folder), "--out", str(bundle_folder)]
    assert run(monkeypatch, bundle_folder, *out) == [bundle_folder]
    told = json.loads(capsys.readouterr().out)
    assert told["bundle"] == str(bundle_folder)
    assert told["bytes"] == sum(path.stat().st_size for path in bundle_folder.iterdir())
    assert told["parity"] == open_bundle(bundle_folder).manifest.parity.max_relative_error


def test_without_a_folder_the_bundle_goes_among_the_others(
    monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bundles" / "paca-vit-of-tests").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, bundle_folder, str(run_folder)) == [Path("bundles/paca-vit-of-tests")]


def test_a_bundle_with_a_torchscript_program_goes_to_those_that_are_made_where_they_are_used(
    monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    out = Path("build/programs/paca-vit-of-tests")
    (tmp_path / out).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, bundle_folder, str(run_folder), "--runtime", "torchscript") == [out]
    assert run(monkeypatch, bundle_folder, str(run_folder), "--runtime", "onnx", "--runtime", "torchscript") == [out]


@pytest.mark.parametrize("runtimes", [[], ["--runtime", "onnx", "--runtime", "torchscript"]])
def test_a_bundle_in_fp16_goes_to_those_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, run_folder: Path, tmp_path: Path, runtimes: list[str]
) -> None:
    out = Path("build/fp16/paca-vit-of-tests")
    (tmp_path / out).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, bundle_folder, str(run_folder), "--precision", "fp16", *runtimes) == [out]
    elsewhere = ["--precision", "fp16", "--out", str(bundle_folder)]
    assert run(monkeypatch, bundle_folder, str(run_folder), *elsewhere) == [bundle_folder]


def test_a_precision_that_there_is_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, bundle_folder, str(run_folder), "--precision", "bf16")
    assert "'fp32', 'fp16'" in capsys.readouterr().err


def test_a_folder_that_holds_nothing_to_export_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, bundle_folder, str(tmp_path))
    assert refused.value.code == (
        f"python -m export: {tmp_path} has neither run.json nor manifest.json; name a training run's folder or a bundle"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (Path("build/native"), False)),
        (["--out", "elsewhere", "--sanitize"], (Path("elsewhere"), True)),
    ],
)
def test_the_native_kernel_is_built_by_a_command_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: tuple[Path, bool],
) -> None:
    built: list[tuple[Path, bool]] = []

    def build(out: Path, *, sanitize: bool) -> Path:
        built.append((out, sanitize))
        return out / "kernel.so"

    monkeypatch.setattr(command, "build_native", build)
    monkeypatch.setattr(sys, "argv", ["export", "build-native", *arguments])
    command.main()
    assert built == [expected]
    assert capsys.readouterr().out == f"{expected[0] / 'kernel.so'}\n"


def test_a_speech_bundle_s_rows_that_are_off_are_told(
    monkeypatch: pytest.MonkeyPatch, speech_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, speech_bundle, str(speech_bundle), "--out", str(speech_bundle))
    parity = open_bundle(speech_bundle).manifest.parity
    assert json.loads(capsys.readouterr().out)["rows_off"] == parity.share_of_rows_off
