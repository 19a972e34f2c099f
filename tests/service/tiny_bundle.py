"""A bundle small enough to make in a test, without torch: its scores are the mean colours of a picture.

The program takes `image`, uint8 (B, 8, 8, 3). It gives `logits` (B, 3), the mean colours over 16, for the labels red,
green and blue, and `clusters` (B, 8, 8), which no request asks for.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.bundle import (
    MANIFEST,
    Golden,
    Manifest,
    Normalisation,
    Origin,
    Parity,
    TensorSpec,
    hash_file,
    write_manifest,
)

NAME = "tiny-mean-8-colours"
SIDE = 8
LABELS = ("red", "green", "blue")
OPSET = 20
PROGRAM, GOLDEN, WEIGHTS, CARD = "model.onnx", "golden.npz", "weights.safetensors", "MODEL_CARD.md"
MAX_BODY_BYTES = 200_000
MAX_PIXELS = 4_000_000

Pixels = npt.NDArray[np.uint8]


def write_tiny_bundle(folder: Path, **facts: Any) -> Path:
    """Write the bundle.

    Args:
        folder: to be made.
        facts: fields of the manifest that differ from the usual.
    Returns: the folder.
    """
    folder.mkdir(parents=True)
    (folder / PROGRAM).write_bytes(make_program().SerializeToString())
    images = np.random.default_rng(3).integers(0, 64, (2, SIDE, SIDE, 3), np.uint8)  # dark: a gated program runs them
    means = images.astype(np.float32).mean((1, 2))
    arrays = {"input.image": images, "output.logits": means / 16, "output.clusters": images.mean(3, dtype=np.float32)}
    np.savez(folder / GOLDEN, **arrays)
    (folder / WEIGHTS).write_bytes(b"weights stand here")
    (folder / CARD).write_text("# A card\n")
    manifest = Manifest(files=_hash_files(folder), **make_facts())
    write_manifest(folder, manifest)
    if facts:
        reseal(folder, **facts)
    return folder


def reseal(folder: Path, **facts: Any) -> None:
    """Change fields of a manifest, valid or not, and bring its checksums up to date."""
    path = folder / MANIFEST
    fields = json.loads(path.read_text()) | {"files": _hash_files(folder)} | facts
    path.write_text(json.dumps(fields))


def make_facts() -> dict[str, Any]:
    """Fields of the manifest, all but `files`."""
    return {
        "format_version": 1,
        "name": NAME,
        "version": "1.2.3",
        "task": "image-classification",
        "default": True,
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "owned_by": "tests",
        "description": "Mean colours.",
        "limits": "No use.",
        "license": "Apache-2.0",
        "notice": "Copyright of somebody; keep this line.",
        "origin": Origin(
            architecture="none",
            command="none",
            seed=3,
            minutes=0.5,
            hardware="none",
            recipe="none",
            data="none",
            data_license="none",
        ),
        "normalisation": Normalisation(mean=(0, 0, 0), std=(1, 1, 1)),
        "spec": {
            "height": SIDE,
            "width": SIDE,
            "resize_shorter_side": SIDE,
            "interpolation": "bilinear",
            "max_pixels": MAX_PIXELS,
            "labels": list(LABELS),
        },
        "max_body_bytes": MAX_BODY_BYTES,
        "max_batch": 4,
        "programs": {"onnx": PROGRAM},
        "opset": OPSET,
        "inputs": (TensorSpec(name="image", dtype="uint8", shape=("batch", SIDE, SIDE, 3)),),
        "outputs": (
            TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),
            TensorSpec(name="clusters", dtype="float32", shape=("batch", SIDE, SIDE)),
        ),
        "golden": Golden(file=GOLDEN, atol=1e-4, rtol=1e-4),
        "parity": Parity(inputs="none", batch_sizes=(1,), max_relative_error={"logits": 0.0}),
        "quality": {"test": {"accuracy": 1.0}},
    }


def make_program() -> onnx.ModelProto:
    """Build the program."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "yx"], ["colours"], keepdims=0),
        helper.make_node("Gemm", ["colours", "weight", "bias"], ["logits"]),
        helper.make_node("ReduceMean", ["pixels", "channel"], ["clusters"], keepdims=0),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    clusters = helper.make_tensor_value_info("clusters", TensorProto.FLOAT, ["batch", SIDE, SIDE])
    constants = [
        numpy_helper.from_array(np.array([1, 2]), "yx"),
        numpy_helper.from_array(np.array([3]), "channel"),
        numpy_helper.from_array(np.eye(3, dtype=np.float32) / 16, "weight"),
        numpy_helper.from_array(np.zeros(3, np.float32), "bias"),
    ]
    graph = helper.make_graph(nodes, "mean_colours", [image], [logits, clusters], constants)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)])


def _hash_files(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
