"""A checkpoint that others published → facts and a model, from which a bundle is made as of a trained model.

Weights stay as they are and nothing is measured: data for it is not at hand. Encoders without a task's layers, and
models for tasks that the service does not have, are refused.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.checkpoint_file import read_checkpoint
from export.published import UNSERVED_PARTS, Publication, find_publication
from export.source import Source
from models import BUILDERS
from models.checkpoints import load_official
from service.bundle import NAME_PATTERN, Conversion, Normalisation, hash_file
from service.tasks import TASKS

VERSION = "1.0.0"
MAX_BODY_BYTES = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user of a converter decides; by default all is as it was published.

    Attributes:
        labels: file with the name of one class in each line; None numbers them.
        license: of the checkpoint.
        key: where a pickled checkpoint has its weights.
        max_batch: samples that may run together.
        settings: fields of the task's spec that differ from the published, and `mean` and `std`.
    """

    labels: Path | None = None
    license: str | None = None
    key: str | None = None
    max_batch: int | None = None
    settings: Mapping[str, Any] | None = None


def convert(config: str, checkpoint: Path, out: Path | None, wishes: Wishes) -> tuple[Source, nn.Module, Path]:
    """Read a published checkpoint.

    Args:
        config: name of the configuration, ours or its publishers'.
        checkpoint: safetensors, or what `torch.save` wrote.
        out: folder of the bundle to be made, which must not exist; its name is the bundle's. None is
            `bundles/CONFIG-DATA`.
        wishes: what differs from the published.
    Returns: facts, the model with the weights, float32, in evaluation mode, and the bundle's folder.
    Raises: ValueError if there is no such configuration or no task for it, the file is no checkpoint or another one's,
        labels, settings or name do not fit, or the folder exists; pydantic's ValidationError; FileNotFoundError.
    """
    builder, publication = find_publication(config)
    out = out or Path("bundles") / f"{builder}-{publication.data.name}"
    if not re.fullmatch(NAME_PATTERN, out.name):
        raise ValueError(f"the bundle would be named {out.name!r}; small letters, digits and hyphens can be; change it")
    if out.exists():
        raise ValueError(f"{out} exists; name another folder with --out, or remove this one")
    if wishes.max_batch is not None and wishes.max_batch < 1:
        raise ValueError(f"max_batch={wishes.max_batch}; it is at least 1")
    labels = read_labels(wishes.labels) if wishes.labels else number_labels(publication.data.num_classes)
    spec, normalisation = _prepare_inputs(publication, wishes.settings or {}, labels)
    model = BUILDERS[builder](num_classes=len(labels))
    _load(model, publication, checkpoint, wishes, num_labels=len(labels))
    command = ["python", "-m", "export", "convert", config, checkpoint.name, *_spell(wishes)]
    source = Source(
        name=out.name,
        version=VERSION,
        task=publication.task,
        default=False,
        created=datetime.now(UTC).replace(microsecond=0),
        owned_by=publication.publisher.split("/")[1],
        description=f"{publication.architecture}: published weights of `{publication.official}`, converted.",
        limits=_tell_limits(publication, wishes),
        license=_tell_license(publication, wishes),
        origin=Conversion(
            architecture=builder,
            configuration=publication.official,
            command=shlex.join(command),
            file=checkpoint.name,
            sha256=hash_file(checkpoint),
            publisher=publication.publisher,
            data=publication.data.title,
            data_license=publication.data.license,
        ),
        normalisation=normalisation,
        spec=spec,
        max_body_bytes=MAX_BODY_BYTES,
        max_batch=publication.max_batch if wishes.max_batch is None else wishes.max_batch,
        quality={},
    )
    return source, model.eval(), out


def read_labels(path: Path) -> list[str]:
    """Read the names of classes, one in each line; names may come twice, as in ImageNet-1k.

    Raises: ValueError if the file is no text or a line is empty; FileNotFoundError.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text; expected is one name in each line") from error
    if "" in lines:
        raise ValueError(f"{path} has no name in line {lines.index('') + 1}; expected is one in each line")
    return lines


def number_labels(number: int) -> list[str]:
    """Name classes of which no names are known."""
    return [f"class_{index}" for index in range(number)]


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Read settings that are written NAME=VALUE, the value as JSON or else as text.

    Raises: ValueError naming the one that has no `=`.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, is_setting, value = text.partition("=")
        if not is_setting:
            raise ValueError(f"{text} is no setting; write NAME=VALUE, such as resize_shorter_side=256")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def _prepare_inputs(
    publication: Publication, settings: Mapping[str, Any], labels: Sequence[str]
) -> tuple[dict[str, Any], Normalisation]:
    ours = {name: value for name, value in settings.items() if name not in Normalisation.model_fields}
    theirs = {name: value for name, value in settings.items() if name in Normalisation.model_fields}
    spec = {**publication.spec, **ours, "labels": list(labels)}
    task = TASKS.get(publication.task)
    if task is None:
        raise ValueError(f"{publication.official} needs the task {publication.task}; known are {', '.join(TASKS)}")
    task.Spec.model_validate_json(json.dumps(spec))
    return spec, Normalisation.model_validate(publication.normalisation.model_dump() | theirs)


def _load(model: nn.Module, publication: Publication, checkpoint: Path, wishes: Wishes, *, num_labels: int) -> None:
    state = read_checkpoint(checkpoint, key=wishes.key)
    for part, task in UNSERVED_PARTS.items():
        if name := next((name for name in state if name.startswith(part)), None):
            raise ValueError(
                f"{checkpoint} holds {name}; it needs a task for {task}, which this service does not have; "
                "classifiers and models for segmentation can be converted"
            )
    bias = state.get(publication.class_bias)
    if bias is not None and bias.numel() != num_labels:  # told in words before shapes tell it
        expected = f"{wishes.labels} names" if wishes.labels else "the published one has"
        raise ValueError(
            f"{checkpoint} has {bias.numel()} classes, {expected} {num_labels}; name the file's classes with --labels"
        )
    load_official(model, publication.prepare(state), publication.renames)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{checkpoint} has values that are no finite numbers, for {name} among others")


def _spell(wishes: Wishes) -> list[str]:
    """Write the options that the weights and the answers depend on, without folders, which are the user's own."""
    labels = ["--labels", wishes.labels.name] if wishes.labels else []
    key = ["--key", wishes.key] if wishes.key else []
    settings = (wishes.settings or {}).items()
    return labels + key + [word for name, value in settings for word in ("--set", f"{name}={json.dumps(value)}")]


def _tell_license(publication: Publication, wishes: Wishes) -> str:
    code = f"the official code is {publication.code_license}"
    if wishes.license:
        return f"{wishes.license}, as stated by whoever converted the checkpoint; not checked here; {code}"
    return f"not known here; {code}, its checkpoints need not be: look at their source before use"


def _tell_limits(publication: Publication, wishes: Wishes) -> str:
    names = "as the user named them" if wishes.labels else "numbered, as no file of names was given"
    told = f"Its classes are {names}, in the order of the checkpoint's outputs. It knows no others."
    if wishes.settings:
        told += f" Preprocessing differs from the published: {', '.join(sorted(wishes.settings))}."
    if publication.task == "image-segmentation":
        told += (
            f" Pictures are scaled to fit into {publication.spec['width']}x{publication.spec['height']} pixels, which "
            "the publishers do not do when they measure."
        )
    return f"{told} Not for decisions about people or safety."
