from pathlib import Path

import pytest

from tests.golden_files import REPOSITORY, golden_files, golden_root


def test_golden_root_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDEN_ROOT", str(tmp_path))
    assert golden_root() == tmp_path


def test_a_golden_root_that_is_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDEN_ROOT", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="GOLDEN_ROOT"):
        golden_root()


def test_files_are_found_by_prefix_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDEN_ROOT", str(tmp_path))
    (tmp_path / "system").mkdir()
    for name in ("b_2.npz", "b_1.safetensors", "a.npz", "README.md"):
        (tmp_path / "system" / name).touch()
    assert [path.name for path in golden_files("system", "b_")] == ["b_1.safetensors", "b_2.npz"]
    assert [path.name for path in golden_files("system")] == ["a.npz", "b_1.safetensors", "b_2.npz"]


def test_every_folder_of_golden_vectors_says_where_they_come_from() -> None:
    for folder in (REPOSITORY / "tests" / "golden").iterdir():
        text = (folder / "README.md").read_text()
        for said in ("commit", "seed", "torch", "Schema", "Tolerance"):
            assert said in text, f"{folder.name}/README.md says nothing of {said}"
        for path in set(folder.iterdir()) - {folder / "README.md"}:
            assert path.stem in text, f"{folder.name}/README.md says nothing of {path.name}"
