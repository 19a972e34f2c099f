"""Segmenters beside each other: what finished runs tell of their quality, and what a picture costs.

Quality is read from each run's `run.json`, as it was measured after training. Multiply-accumulates are counted from
shapes. CPU time is that of the module in float32 on one thread, pictures one by one, the models taking turns.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.macs import count_macs
from models import BUILDERS
from training.handover import RUN, WEIGHTS

TASK = "image-segmentation"
RUNS = Path("build/training")


class SegmenterResult(NamedTuple):
    """What is known of one finished run.

    Attributes:
        name: of the run.
        minutes: that training took.
        hardware: that it took them on.
        num_parameters: of the model.
        gmacs: multiply-accumulates for a picture of the model's size, in 1e9.
        cpu_ms: CPU time for such a picture, median.
        quality: split → metric → value.
    """

    name: str
    minutes: float
    hardware: str
    num_parameters: int
    gmacs: float
    cpu_ms: float
    quality: dict[str, dict[str, float]]


def find_runs(folder: Path) -> list[Path]:
    """List the finished runs of segmenters among the folders in a folder, in order of their names."""
    found = [path.parent for path in sorted(folder.glob(f"*/{RUN}")) if (path.parent / WEIGHTS).exists()]
    return [run for run in found if _read(run)["task"] == TASK]


def measure_segmenters(runs: Sequence[Path], *, rounds: int) -> list[SegmenterResult]:
    """Read, count and time finished runs.

    Args:
        runs: their folders.
        rounds: how often each model sees a picture, after once to warm up.
    """
    told = [_read(run) for run in runs]
    models = [_load(run, facts) for run, facts in zip(runs, told, strict=True)]
    pictures = [torch.randn(1, 3, *_size(facts), generator=torch.Generator().manual_seed(0)) for facts in told]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = [
            [_time(model, picture) for model, picture in zip(models, pictures, strict=True)] for _ in range(rounds + 1)
        ]
    finally:
        torch.set_num_threads(num_threads)
    return [
        SegmenterResult(
            name=facts["name"],
            minutes=facts["origin"]["minutes"],
            hardware=facts["origin"]["hardware"],
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            gmacs=_count(facts),
            cpu_ms=1e3 * median(times[1:]),
            quality=facts["quality"],
        )
        for facts, model, times in zip(told, models, zip(*seconds, strict=True), strict=True)
    ]


def render_segmenters(results: Sequence[SegmenterResult]) -> str:
    """Write two tables: what models cost and reach, and the classes one by one."""
    lines = [
        "| run | parameters, M | GMAC | CPU-ms | minutes of training | mIoU, valid | mIoU, test_dev |",
        "|---" * 7 + "|",
    ]
    for run in results:
        mious = " | ".join(f"{100 * run.quality[split]['mean_iou']:.1f}" for split in ("valid", "test_dev"))
        lines.append(
            f"| {run.name} | {run.num_parameters / 1e6:.2f} | {run.gmacs:.2f} | {run.cpu_ms:.0f} | {run.minutes:.0f} "
            f"| {mious} |"
        )
    classes = [name for name in results[0].quality["test_dev"] if name.startswith("iou_")]
    lines += [
        "",
        "Intersection over union on test_dev, per cent:",
        "",
        f"| run | {' | '.join(name.removeprefix('iou_') for name in classes)} |",
        "|---" * (len(classes) + 1) + "|",
    ]
    for run in results:
        ious = " | ".join(f"{100 * run.quality['test_dev'][name]:.1f}" for name in classes)
        lines.append(f"| {run.name} | {ious} |")
    trained_on = ", ".join(sorted({run.hardware for run in results}))
    lines += ["", f"CPU-ms: one picture, the module in float32 on one thread. Trained on: {trained_on}."]
    return "\n".join(lines)


def _read(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / RUN).read_text())
    return facts


def _size(facts: dict[str, Any]) -> tuple[int, int]:
    return facts["spec"]["height"], facts["spec"]["width"]


def _build(facts: dict[str, Any]) -> nn.Module:
    return BUILDERS[facts["origin"]["architecture"]](num_classes=len(facts["spec"]["labels"]))


def _load(run: Path, facts: dict[str, Any]) -> nn.Module:
    model = _build(facts)
    model.load_state_dict(load_file(run / WEIGHTS))  # which widens what is stored in half precision
    return model.eval()


def _count(facts: dict[str, Any]) -> float:
    rows, columns = _size(facts)
    with torch.device("meta"):
        model = _build(facts)
    return count_macs(model, rows=rows, columns=columns).total() / 1e9


@torch.inference_mode()
def _time(model: nn.Module, picture: Tensor) -> float:
    start = time.process_time()
    model(picture)
    return time.process_time() - start
