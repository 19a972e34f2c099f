import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import brain_networks
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.brain_network_report import render_cells
from benchmarks.brain_network_rows import ROWS, TASKS, TaskSettings
from benchmarks.brain_networks import Cell, list_cells, measure_cells
from models.thc import Thc
from models.thc_config import ThcConfig
from tests.training.tiny_connectomes import write_connectomes


def make_tiny(num_regions: int, task: TaskSettings) -> Thc:
    config = ThcConfig(num_regions=num_regions, sizes=(6, 3), num_heads=2, hidden_dim=8, encoder="none", readout_dim=2)
    return Thc(config, num_classes=task.num_classes)


def find_row(key: str) -> Any:
    return next(row for row in ROWS if row.key == key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_connectomes(tmp_path)
    return tmp_path


def test_default_and_ridge_are_on_all_tasks_and_the_published_layout_on_one() -> None:
    cells = list_cells()
    assert {cell.task for cell in cells if cell.row.key == "thc"} == set(TASKS)
    assert {cell.seed for cell in cells if cell.row.key == "thc"} == {1, 2, 3}
    assert {cell.task for cell in cells if cell.row.key == "thc-official"} == {"abide-diagnosis"}
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


@pytest.mark.parametrize("what", ["brain-networks", "clustering"])
def test_a_subject_that_was_named_is_refused_without_data(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", what, "--quick", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        benchmarks_main()
    assert f"{tmp_path / 'nowhere'} is not here" in capsys.readouterr().err


def test_rows_and_tasks_can_be_chosen_and_others_are_refused() -> None:
    cells = list_cells(["ridge"], ["mdd"])
    assert [(cell.row.key, cell.task, cell.fold) for cell in cells] == [("ridge", "mdd", fold) for fold in range(5)]
    with pytest.raises(ValueError, match="svm is not known; one of ridge, "):
        list_cells(["svm"])


def test_cells_with_other_settings_have_other_files() -> None:
    row = find_row("thc")
    cell = Cell(row, "mdd", 1, 0)
    others = [
        replace(cell, seed=2),
        replace(cell, fold=1),
        replace(cell, task="abide-age"),
        replace(cell, row=replace(row, num_steps=7)),
        replace(cell, row=replace(row, make=make_tiny)),
    ]
    assert len({one.path for one in (cell, *others)}) == 6
    assert Cell(row, "mdd", 1, 0).path == cell.path


def test_a_finished_cell_is_not_measured_again_and_the_tables_tell_what_was_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(find_row("thc"), make=make_tiny, num_steps=3)
    cells = [Cell(row, "mdd", 1, fold) for fold in (0, 1)] + [
        Cell(find_row("ridge"), "mdd", 1, fold) for fold in (0, 1)
    ]
    found = measure_cells(cells, data=folder, work=folder / "work")
    assert found[cells[2]]["metrics"]["auroc"] > 0.95  # a class that anyone can tell
    communities = found[cells[0]]["communities"]
    assert set(communities) == {f"{way}, level {level}" for way in ("learned", "k-means", "chance") for level in (1, 2)}
    assert communities["k-means, level 1"]["num_parts"] <= 6

    def fail(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(brain_networks, "measure_cell", fail)
    again = measure_cells(cells, data=folder, work=folder / "work")
    assert json.dumps(list(again.values())) == json.dumps(list(found.values()))

    monkeypatch.setattr("benchmarks.brain_network_report.ROWS", (row, find_row("ridge")))
    text = render_cells(found)
    mean = (found[cells[0]]["metrics"]["auroc"] + found[cells[1]]["metrics"]["auroc"]) / 2
    line = next(line for line in text.splitlines() if "THC, default (2 of 5 folds)" in line)
    assert f"| {mean:.3f} ± " in line
    assert f"| {found[cells[0]]['metrics']['auroc']:.3f} |" in line  # of fold 0
    assert "| mdd | THC, default | learned, level 1 |" in text
    assert "ABIDE" not in text.split("## ")[1]


@pytest.mark.parametrize("row", [row for row in ROWS if row.make], ids=lambda row: row.key)
def test_every_model_can_be_made_for_its_tasks_and_is_small_but_for_the_published_one(row: Any) -> None:
    with torch.device("meta"):
        for task in row.tasks:
            model = row.make({"mdd": 78, "adhd-site": 190}.get(task, 116), TASKS[task])
            number = sum(parameter.numel() for parameter in model.parameters())
            assert (number < 5_000_000) == (row.key != "thc-official")
