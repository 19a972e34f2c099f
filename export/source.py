"""What an export starts from: a training run's folder or an existing bundle, each with weights and facts.

A run's folder holds `weights.safetensors` and `run.json`; a bundle has the same facts in its manifest, so that every
program can be made again without training.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import nn

from models import BUILDERS
from service.bundle import MANIFEST, Conversion, Normalisation, Origin, open_bundle

WEIGHTS = "weights.safetensors"
RUN = "run.json"


class Source(BaseModel):
    """Facts about weights, trained here or converted; the fields are those of the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    task: str
    default: bool
    created: datetime
    owned_by: str
    description: str
    limits: str
    license: str
    notice: str = ""
    origin: Origin | Conversion
    normalisation: Normalisation
    spec: dict[str, Any]
    max_body_bytes: int
    max_batch: int
    quality: dict[str, dict[str, float]]


def read_source(folder: Path) -> tuple[Source, nn.Module]:
    """Read facts and weights.

    Args:
        folder: of a training run or of a bundle.
    Returns: the facts and the model, float32, in evaluation mode.
    Raises: ValueError if the folder is neither; pydantic's ValidationError; BundleError.
    """
    if (folder / RUN).exists():
        source = Source.model_validate_json((folder / RUN).read_bytes())
    elif (folder / MANIFEST).exists():
        manifest = open_bundle(folder).manifest
        source = Source.model_validate({name: getattr(manifest, name) for name in Source.model_fields})
    else:
        raise ValueError(f"{folder} has neither {RUN} nor {MANIFEST}; name a training run's folder or a bundle")
    model = BUILDERS[source.origin.architecture](num_classes=len(source.spec["labels"]))
    weights = load_file(folder / WEIGHTS)
    model.load_state_dict({name: w.to(torch.float32) for name, w in weights.items()})
    return source, model.eval()
