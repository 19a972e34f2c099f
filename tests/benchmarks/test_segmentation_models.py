"""Two runs of a tiny segmenter that differ in what they tell of their quality."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import QUICK, find_missing, report_segmentation
from benchmarks.segmentation_models import find_runs, measure_segmenters, render_segmenters
from models import BUILDERS
from models.paca_seg import PaCaFpnSegmenter
from models.paca_vit import PaCaViTConfig
from models.semantic_fpn import SemanticFpnConfig
from training.__main__ import round_to_half, save_half

SIZE = (32, 48)
CONFIG = PaCaViTConfig(
    dims=(8, 16),
    num_heads=(2, 2),
    depths=(1, 1),
    mlp_ratios=(2, 2),
    num_clusters=(4, 0),
    clustering_kernel_sizes=(3, 3),
    onsite_clustering=(0, 0),
)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build = partial(PaCaFpnSegmenter, CONFIG, head=SemanticFpnConfig(pyramid_dim=8, dim=8))
    monkeypatch.setitem(BUILDERS, "tiny-segmenter", build)
    for i, (name, task) in enumerate(
        (("b-run", "image-segmentation"), ("a-run", "image-segmentation"), ("c-run", "image-classification"))
    ):
        folder = tmp_path / name
        folder.mkdir()
        model = build(num_classes=2)
        round_to_half(model)
        save_half(model, folder / "weights.safetensors")
        quality = {"mean_iou": 0.5 + i / 10, "pixel_accuracy": 0.9, "iou_sky": 0.25, "iou_road": 0.75 + i / 5}
        facts = {
            "name": name,
            "task": task,
            "origin": {"architecture": "tiny-segmenter", "minutes": 7.4, "hardware": "2 cores of a machine"},
            "spec": {"labels": ["sky", "road"], "height": SIZE[0], "width": SIZE[1]},
            "quality": {"valid": quality | {"mean_iou": 0.9}, "test_dev": quality},
        }
        (folder / "run.json").write_text(json.dumps(facts))
    unfinished = tmp_path / "d-run"
    unfinished.mkdir()
    (unfinished / "checkpoint.pt").touch()
    return tmp_path


def test_only_finished_runs_of_segmenters_are_found(runs: Path, tmp_path: Path) -> None:
    assert [run.name for run in find_runs(runs)] == ["a-run", "b-run"]
    assert find_missing("segmentation", runs, runs, runs) is None
    assert (
        find_missing("segmentation", runs, runs, runs / "d-run")
        == f"{runs / 'd-run'} has no finished run of a segmenter"
    )
    with pytest.raises(FileNotFoundError, match="--runs"):
        report_segmentation(runs, QUICK, runs=runs / "d-run")


def test_cost_is_that_of_the_model_and_quality_that_of_the_run(runs: Path) -> None:
    num_threads = torch.get_num_threads()
    first, second = measure_segmenters(find_runs(runs), rounds=2)
    assert torch.get_num_threads() == num_threads
    model = BUILDERS["tiny-segmenter"](num_classes=2).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *SIZE))
    assert first.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert first.gmacs * 1e9 == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    assert first.cpu_ms > 0
    assert (first.name, first.minutes, first.quality["test_dev"]["mean_iou"]) == ("a-run", 7.4, 0.6)
    assert (second.name, second.quality["valid"]["mean_iou"]) == ("b-run", 0.9)


def test_tables_tell_both_splits_and_every_class(runs: Path) -> None:
    results = measure_segmenters(find_runs(runs), rounds=1)
    table = render_segmenters(results)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| a-")]
    assert cells[0][0] == "a-run"
    assert cells[0][4:] == ["7", "90.0", "60.0"]
    assert cells[1] == ["a-run", "25.0", "95.0"]
    assert "| run | sky | road |" in table
    assert "2 cores of a machine" in table
