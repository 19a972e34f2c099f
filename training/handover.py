"""What a finished run tells `python -m export`, or a run that starts from it: `run.json`.

Its fields are those of a bundle's manifest.
"""

import hashlib
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from service.bundle import MANIFEST, Conversion, Origin, open_bundle
from training.recipe import Recipe

RUN = "run.json"
WEIGHTS = "weights.safetensors"
OWNER = "clustered-attention-server"


@dataclass(frozen=True)
class Start:
    """Trained weights that a run starts from.

    Attributes:
        folder: as the user named it.
        name, version: of the run or the bundle.
        origin: how the weights were made.
    """

    folder: Path
    name: str
    version: str
    origin: Origin | Conversion

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.folder / WEIGHTS


def read_start(folder: Path) -> Start:
    """Read what a run starts from.

    Args:
        folder: of a finished run or of a bundle.
    Raises: ValueError if the folder is neither; pydantic's ValidationError; BundleError.
    """
    if (folder / RUN).exists():
        run = json.loads((folder / RUN).read_text())
        return Start(folder, run["name"], run["version"], Origin.model_validate(run["origin"]))
    if (folder / MANIFEST).exists():
        manifest = open_bundle(folder).manifest
        return Start(folder, manifest.name, manifest.version, manifest.origin)
    raise ValueError(f"{folder} has neither {RUN} nor {MANIFEST}; name a finished run's folder or a bundle")


def describe_run(
    recipe: Recipe,
    quality: dict[str, dict[str, float]],
    *,
    data: Path,
    minutes: float,
    device: torch.device,
    start: Start | None = None,
) -> dict[str, Any]:
    """Collect the facts about trained weights.

    Args:
        recipe: what was trained.
        quality: split → metric → value, measured with the weights as they ship.
        data: folder of all data sets.
        minutes: that training took.
        device: that it ran on.
        start: what it started from, instead of fresh weights.
    """
    facts = recipe.facts
    command, numbers = f"python -m training {recipe.name}", _summarise(recipe)
    if start is not None:
        command += f" --from {start.folder}"
        sha256 = hashlib.sha256(start.weights.read_bytes()).hexdigest()
        made = f"made in {start.origin.minutes:.0f} minutes by" if isinstance(start.origin, Origin) else "made by"
        numbers += (
            f". Started from {start.name} {start.version} (weights with SHA-256 {sha256}), {made} "
            f"`{start.origin.command}`: {start.origin.recipe}"
        )
    return {
        "name": recipe.name,
        "version": facts.version,
        "default": facts.is_default,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "owned_by": OWNER,
        "description": facts.description,
        "limits": facts.limits,
        "license": facts.license,
        "notice": facts.notice,
        "origin": {
            "architecture": recipe.model,
            "command": command,
            "seed": recipe.seed,
            "minutes": round(minutes, 1),
            "hardware": _name_hardware(device),
            "recipe": numbers,
            "data": facts.data,
            "data_license": facts.data_license,
        },
        "max_body_bytes": facts.max_body_bytes,
        "max_batch": facts.max_batch,
        "quality": quality,
        **recipe.problem.describe(data),
    }


def _summarise(recipe: Recipe) -> str:
    """Name every number of the recipe that shapes the weights, as `field=value`."""
    told_elsewhere = {"name", "model", "facts", "seed", "problem", "optimizer"}
    numbers = {name: value for name, value in vars(recipe).items() if name not in told_elsewhere}
    numbers |= asdict(recipe.optimizer)
    of_the_data = {"labels", "train_file", "valid_file", "valid_takes", "test_file", "picture", "audio", "mean", "std"}
    of_the_answer = {"word_model"}
    numbers |= {name: value for name, value in vars(recipe.problem).items() if name not in of_the_data | of_the_answer}
    return ", ".join(f"{name}={value}" for name, value in numbers.items())


def _name_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{num_cores} core{'s' if num_cores > 1 else ''} of {name}"
