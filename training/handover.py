"""What a finished run tells `python -m export`: `run.json`, with the fields of a bundle's manifest."""

import os
import platform
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from training.recipe import Recipe

RUN = "run.json"
OWNER = "clustered-attention-server"


def describe_run(
    recipe: Recipe, quality: dict[str, dict[str, float]], *, minutes: float, device: torch.device
) -> dict[str, Any]:
    """Collect the facts about trained weights.

    Args:
        recipe: what was trained.
        quality: split → metric → value, measured with the weights as they ship.
        minutes: that training took.
        device: that it ran on.
    """
    facts = recipe.facts
    return {
        "name": recipe.name,
        "version": facts.version,
        "default": facts.is_default,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "owned_by": OWNER,
        "description": facts.description,
        "limits": facts.limits,
        "license": facts.license,
        "origin": {
            "architecture": recipe.model,
            "command": f"python -m training {recipe.name}",
            "seed": recipe.seed,
            "minutes": round(minutes, 1),
            "hardware": _name_hardware(device),
            "recipe": _summarise(recipe),
            "data": facts.data,
            "data_license": facts.data_license,
        },
        "max_body_bytes": facts.max_body_bytes,
        "max_batch": facts.max_batch,
        "quality": quality,
        **recipe.problem.describe(recipe.labels),
    }


def _summarise(recipe: Recipe) -> str:
    """Name every number of the recipe that shapes the weights, as `field=value`."""
    told_elsewhere = {"name", "model", "labels", "facts", "seed", "problem", "optimizer"}
    numbers = {name: value for name, value in vars(recipe).items() if name not in told_elsewhere}
    numbers |= asdict(recipe.optimizer)
    of_the_data = {"train_file", "test_file", "picture", "mean", "std"}
    numbers |= {name: value for name, value in vars(recipe.problem).items() if name not in of_the_data}
    return ", ".join(f"{name}={value}" for name, value in numbers.items())


def _name_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}"
