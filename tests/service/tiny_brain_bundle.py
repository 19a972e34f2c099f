"""A bundle of a brain-network classifier, small enough to make in a test, without torch.

The program takes `connectivity`, float32 (B, 6, 6). Of its `logits` the first is the mean over all pairs, the second
is 0. `assignment_level1`, (B, 6, 4), is the softmax of ten times the first four columns; `assignment_level2`,
(B, 4, 2), is the same for everyone: communities 0 and 1 belong together, as do 2 and 3.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.bundle import MANIFEST, Golden, Manifest, TensorSpec, write_manifest
from tests.service.tiny_bundle import CARD, GOLDEN, OPSET, PROGRAM, WEIGHTS, make_facts, reseal

NAME = "tiny-mean-6-regions"
LABELS = ("control", "patient")
REGIONS = ("A", "B", "C", "D", "E", "F")
NUM_REGIONS = len(REGIONS)
PAIRS = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]], np.float32)
MAX_BODY_BYTES = 100_000


def write_tiny_brain_bundle(folder: Path, **facts: Any) -> Path:
    """Write the bundle.

    Args:
        folder: to be made.
        facts: fields of the manifest's spec that differ from the usual.
    Returns: the folder.
    """
    folder.mkdir(parents=True)
    (folder / PROGRAM).write_bytes(make_program().SerializeToString())
    matrices = np.random.default_rng(2).uniform(-1, 1, (2, NUM_REGIONS, NUM_REGIONS)).astype(np.float32)
    matrices += matrices.swapaxes(1, 2)
    weights = np.exp(10 * matrices[:, :, :4])
    np.savez(
        folder / GOLDEN,
        **{
            "input.connectivity": matrices,
            "output.logits": np.stack([matrices.mean((1, 2)), np.zeros(2, np.float32)], axis=1),
            "output.assignment_level1": weights / weights.sum(axis=2, keepdims=True),
            "output.assignment_level2": np.stack([PAIRS, PAIRS]),
        },
    )
    (folder / WEIGHTS).write_bytes(b"weights stand here")
    (folder / CARD).write_text("# A card\n")
    spec = {
        "labels": list(LABELS),
        "atlas": "TINY-6",
        "regions": list(REGIONS),
        "matrix": "fisher_z",
        "min_frames": 5,
        "num_communities": [4, 2],
    }
    changes: dict[str, Any] = {
        "name": NAME,
        "task": "brain-network-classification",
        "spec": spec | facts,
        "max_body_bytes": MAX_BODY_BYTES,
        "inputs": (TensorSpec(name="connectivity", dtype="float32", shape=("batch", NUM_REGIONS, NUM_REGIONS)),),
        "outputs": (
            TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),
            TensorSpec(name="assignment_level1", dtype="float32", shape=("batch", NUM_REGIONS, 4)),
            TensorSpec(name="assignment_level2", dtype="float32", shape=("batch", 4, 2)),
        ),
        "golden": Golden(file=GOLDEN, atol=1e-4, rtol=1e-4),
    }
    files = dict.fromkeys((PROGRAM, GOLDEN, WEIGHTS, CARD), "0" * 64)
    write_manifest(folder, Manifest(files=files, **make_facts() | changes))
    reseal(folder)
    assert (folder / MANIFEST).is_file()
    return folder


def make_program() -> onnx.ModelProto:
    """Build the program."""
    nodes = [
        helper.make_node("ReduceMean", ["connectivity", "rows_and_columns"], ["means"], keepdims=0),
        helper.make_node("Unsqueeze", ["means", "last"], ["column"]),
        helper.make_node("MatMul", ["column", "first"], ["logits"]),
        helper.make_node("MatMul", ["connectivity", "ten_times_four"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["assignment_level1"], axis=-1),
        # Nothing of the connectivity but its batch.
        helper.make_node("Mul", ["column", "zero"], ["nothing"]),
        helper.make_node("Unsqueeze", ["nothing", "last"], ["nothings"]),
        helper.make_node("Add", ["nothings", "pairs"], ["assignment_level2"]),
    ]
    inputs = [helper.make_tensor_value_info("connectivity", TensorProto.FLOAT, ["batch", NUM_REGIONS, NUM_REGIONS])]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("logits", [2]), ("assignment_level1", [NUM_REGIONS, 4]), ("assignment_level2", [4, 2]))
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2]), "rows_and_columns"),
        numpy_helper.from_array(np.array([-1]), "last"),
        numpy_helper.from_array(np.array([[1, 0]], np.float32), "first"),
        numpy_helper.from_array(10 * np.eye(NUM_REGIONS, 4, dtype=np.float32), "ten_times_four"),
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
        numpy_helper.from_array(PAIRS, "pairs"),
    ]
    graph = helper.make_graph(nodes, "mean_regions", inputs, outputs, constants)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)])
