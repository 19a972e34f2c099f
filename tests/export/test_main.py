import json
import sys
from pathlib import Path
from typing import Any

import pytest

import export.__main__ as command
from export.source import Source
from service.bundle import open_bundle


def run(monkeypatch: pytest.MonkeyPatch, bundle_folder: Path, *arguments: str) -> list[Path]:
    """Run the command; gives the folders that it wrote to, in place of writing."""
    written: list[Path] = []

    def write(source: Source, model: Any, out: Path) -> Any:
        written.append(out)
        return open_bundle(bundle_folder).manifest

    monkeypatch.setattr(command, "write_classifier_bundle", write)
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
