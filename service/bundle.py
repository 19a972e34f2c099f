"""Bundles: the folder in which a trained model meets the service.

    manifest.json         what this is, how it is fed, what it gives, how good it is, sha256 of every other file
    <program>             what a runtime loads, one file for each runtime
    weights.safetensors   the trained module, from which every program can be made again
    golden.npz            inputs (`input.<name>`) and outputs (`output.<name>`) that a program must reproduce
    MODEL_CARD.md         data, licence, recipe, limits

No pickles and no native code. Nothing in a bundle is used before its checksum held.
"""

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import BundleError
from service.sample import Arrays

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEQUENCE_PARALLEL = "sequence_parallel"  # the runtime of long samples, beside an ordinary one
NAME_PATTERN = r"^[a-z0-9]+(-[a-z0-9]+)*$"

Precision = Literal["fp32", "fp16"]  # of programs; fp16 is mixed: decisions, norms and outputs stay float32

# What numpy raises for a file that is no npz, is damaged or holds pickled objects.
_DAMAGE = (OSError, ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Part):
    """An input or output of the program."""

    name: str
    dtype: str = Field(description="numpy's name of the element type.")
    shape: tuple[int | str, ...] = Field(description="A number, or the name of a dimension that varies.")


class Golden(_Part):
    """How closely the program must reproduce `golden.npz` before it serves."""

    file: str
    atol: float = Field(ge=0, description="Of the outputs that `atol_by_output` does not name.")
    atol_by_output: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="Output → its own atol; empty where one serves all."
    )
    rtol: float = Field(ge=0)
    max_share_off: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of an output's numbers that may be beyond both: where queries are clustered by hashes, a "
        "near tie may fall differently on another processor.",
    )
    outputs: tuple[str, ...] = Field(default=(), description="Names of the outputs in it; all where none are named.")


class Origin(_Part):
    """Where weights that were trained here come from, so that they can be made again."""

    architecture: str = Field(description="Key of the model among the builders.")
    command: str = Field(description="Trains it.")
    seed: int
    minutes: float = Field(description="Time the training took.")
    hardware: str = Field(description="What it was trained on.")
    recipe: str = Field(description="The recipe in words and numbers.")
    data: str = Field(description="Data set and splits.")
    data_license: str


class Conversion(_Part):
    """Where weights that others trained and published come from."""

    architecture: str = Field(description="Key of the model among the builders.")
    configuration: str = Field(description="What the publishers call it.")
    command: str = Field(description="Converts the file.")
    file: str = Field(description="The published checkpoint.")
    sha256: str = Field(description="Of that file, hexadecimal.")
    publisher: str = Field(description="Whose code it was made with, and the commit that its names were read from.")
    data: str
    data_license: str

    @property
    def recipe(self) -> str:
        """How the weights were made, in words."""
        return f"converted from {self.file} (SHA-256 {self.sha256}), which others trained"


class Normalisation(_Part):
    """What the program does to its input before the first layer; told here so that programs can be made again."""

    mean: tuple[float, ...] = Field(
        min_length=1, description="Of pixels in [0, 1], per channel; of log-mel features, for all bands or per band."
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_lengths(self) -> "Normalisation":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} numbers, std has {len(self.std)}; they must have as many")
        return self


class Parity(_Part):
    """Largest difference between the trained module and the program, max|a-b| / max|b|, over natural inputs.

    A row is off if it differs by more than 1e-5, of programs in fp16 by more than 1e-2.
    """

    inputs: str = Field(description="What was compared on.")
    batch_sizes: tuple[int, ...] = Field(description="None of them was used for the export.")
    max_relative_error: dict[str, float] = Field(
        description="Output → largest difference, in rows that are not off; of programs in fp16 in all rows, the "
        "module taking the program's decisions."
    )
    share_of_rows_off: dict[str, float] = Field(
        default={},
        description="Output → share of its rows that are off, as near ties of clustering by hashes fell differently; "
        "empty where nothing is decided and no row is off.",
    )


class Manifest(_Part):
    """Everything the service needs to know about a model."""

    format_version: Literal[1] = Field(description="Of the bundle's layout.")
    name: str = Field(pattern=NAME_PATTERN, description="family-version-size-data")
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    task: str = Field(description="Which task it does; also the URL segment.")
    default: bool = Field(description="Whether it answers where a request names no model.")
    created: datetime
    owned_by: str
    description: str
    limits: str = Field(description="What the model must not be expected to do.")
    license: str = Field(description="Of the weights, with what their data require.")
    notice: str = Field(
        default="", description="What the licence of the data wants to see wherever the bundle goes, word for word."
    )
    origin: Origin | Conversion
    normalisation: Normalisation
    spec: dict[str, Any] = Field(description="What the task wants to know: sizes, labels, limits of one input.")
    max_body_bytes: int = Field(ge=1)
    max_batch: int = Field(ge=1, description="Upper bound; warm-up may find a smaller batch to be as good.")
    length_buckets: tuple[int, ...] = Field(
        default=(), description="Longest lengths that are batched together, ascending; empty where all have one shape."
    )
    short_length: int | None = Field(
        default=None, description="Samples in buckets above it are long: one worker is kept free of them."
    )
    long_length: int | None = Field(
        default=None,
        description="One of the buckets; samples beyond it are spread over ranks, where there are any.",
    )
    programs: dict[str, str] = Field(
        min_length=1, description="Runtime → file; sequence_parallel takes the weights and the origin's architecture."
    )
    precision: Precision = Field(default="fp32", description="What the programs compute in; `export` tells the rule.")
    opset: int | None = Field(default=None, description="Of the ONNX program.")
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    golden: Golden
    parity: Parity
    quality: dict[str, dict[str, float]] = Field(
        description="Split → metric → value, measured with these weights; empty where nothing was measured."
    )
    files: dict[str, str] = Field(description="Every other file → its sha256, hexadecimal.")

    @model_validator(mode="after")
    def _check_files(self) -> "Manifest":
        used = {*self.programs.values(), self.golden.file}
        if missing := used - self.files.keys():
            raise ValueError(f"files has no checksum of {', '.join(sorted(missing))}")
        if strays := [name for name in self.files if Path(name).name != name or name == MANIFEST]:
            raise ValueError(f"files names {', '.join(strays)}; a bundle is one flat folder")
        if list(self.length_buckets) != sorted(set(self.length_buckets)):
            raise ValueError("length_buckets must ascend")
        if (SEQUENCE_PARALLEL in self.programs) != (self.long_length is not None):
            raise ValueError(f"programs names {SEQUENCE_PARALLEL} if and only if long_length says for which samples")
        if self.long_length is not None and self.long_length not in self.length_buckets:
            raise ValueError(f"long_length {self.long_length} must be one of length_buckets, so that no batch has both")
        return self


@dataclass(frozen=True)
class Bundle:
    """A folder whose checksums held.

    Attributes:
        folder: where it lies.
        manifest: what it says.
        sha256: of the manifest, and through it of everything.
    """

    folder: Path
    manifest: Manifest
    sha256: str

    def read_golden(self) -> tuple[Arrays, Arrays]:
        """Read golden inputs and outputs, each by the program's name for it.

        Raises: BundleError if the file is no npz of plain arrays, or an input or output is missing.
        """
        golden = self.manifest.golden
        path = self.folder / golden.file
        kept = golden.outputs or tuple(tensor.name for tensor in self.manifest.outputs)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
                arrays = {name: array for name, array in npz.items() if isinstance(array, np.ndarray)}
        except _DAMAGE as error:
            raise BundleError(f"{path} is no npz file of plain arrays: {error}; export the bundle again") from error
        try:
            return (
                {tensor.name: arrays[f"input.{tensor.name}"] for tensor in self.manifest.inputs},
                {name: arrays[f"output.{name}"] for name in kept},
            )
        except KeyError as error:
            raise BundleError(f"{path} has no array {error}; export the bundle again") from error


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle's manifest and check every file against it.

    Args:
        folder: holds `manifest.json`.
    Raises: BundleError naming the file at fault.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        manifest = Manifest.model_validate_json(text)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}; export the bundle again") from error
    except ValidationError as error:
        raise BundleError(f"{path} is not a manifest of format {FORMAT_VERSION}: {error}") from error
    for name, expected in manifest.files.items():
        try:
            found = hash_file(folder / name)
        except (OSError, ValueError) as error:  # ValueError: a name with a null character
            raise BundleError(f"{folder / name} cannot be read: {error}; export the bundle again") from error
        if found != expected:
            raise BundleError(f"{folder / name} has sha256 {found}, expected {expected}; export the bundle again")
    strays = {item.name for item in folder.iterdir()} - manifest.files.keys() - {MANIFEST}
    if strays:
        raise BundleError(f"{folder} holds {', '.join(sorted(strays))}, which its manifest does not list; remove it")
    return Bundle(folder, manifest, hashlib.sha256(text).hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, readable by people; the usual precision and one atol for all go without saying."""
    unsaid: dict[str, Any] = {"precision": True} if manifest.precision == "fp32" else {}
    if not manifest.golden.atol_by_output:
        unsaid["golden"] = {"atol_by_output"}
    text = json.dumps(manifest.model_dump(mode="json", exclude=unsaid), indent=2) + "\n"
    (folder / MANIFEST).write_text(text)


def hash_file(path: Path) -> str:
    """Compute the sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
