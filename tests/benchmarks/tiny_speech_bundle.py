"""A speech recogniser small enough to make in a test, without torch: to it every recording of any length says A."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.bundle import TensorSpec
from tests.service.tiny_bundle import GOLDEN, OPSET, PROGRAM, reseal, write_tiny_bundle

NAME, LABELS, NUM_MELS = "tiny-letter-a", ["", " ", "A"], 20
LOG_PROBS = np.log(np.array([0.1, 0.1, 0.8], np.float32))


def write_speech_bundle(folder: Path, **facts: object) -> Path:
    """Write the bundle; `facts` are fields of its manifest that differ from the usual."""
    write_tiny_bundle(folder)
    (folder / PROGRAM).write_bytes(make_program().SerializeToString())
    features = np.zeros((2, 7, NUM_MELS), np.float32)
    inputs = {"input.features": features, "input.lengths": np.array([7, 4])}
    np.savez(folder / GOLDEN, **inputs, **{"output.log_probs": np.broadcast_to(LOG_PROBS, (2, 7, 3))})
    tensors = {
        "inputs": [
            TensorSpec(name="features", dtype="float32", shape=("batch", "frames", NUM_MELS)),
            TensorSpec(name="lengths", dtype="int64", shape=("batch",)),
        ],
        "outputs": [TensorSpec(name="log_probs", dtype="float32", shape=("batch", "frames", 3))],
    }
    spec = {
        "sample_rate_hz": 16_000,
        "min_seconds": 0.1,
        "max_seconds": 60.0,
        "features": {"num_mels": NUM_MELS},
        "labels": LABELS,
        "subsampling": 1,
        "beam_width": 1,
        "has_clusters": False,
    }
    reseal(
        folder,
        **{"name": NAME, "task": "speech-recognition", "spec": spec, "max_body_bytes": 4_000_000}
        | {"length_buckets": [500, 6_000]}
        | {name: [tensor.model_dump() for tensor in parts] for name, parts in tensors.items()}
        | facts,
    )
    return folder


def make_program() -> onnx.ModelProto:
    """Build the program: the same probabilities in every frame."""
    nodes = [
        helper.make_node("Cast", ["lengths"], ["numbers"], to=TensorProto.FLOAT),  # an input must be used
        helper.make_node("ReduceMean", ["features", "bands"], ["loudness"]),  # (B, T, 1)
        helper.make_node("ReduceMean", ["numbers"], ["number"], keepdims=0),
        helper.make_node("Mul", ["loudness", "number"], ["product"]),
        helper.make_node("Mul", ["product", "zeros"], ["rows"]),  # (B, T, 3)
        helper.make_node("Add", ["rows", "values"], ["log_probs"]),
    ]
    inputs = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", "frames", NUM_MELS]),
        helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
    ]
    output = helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["batch", "frames", 3])
    constants = [
        numpy_helper.from_array(np.array([2]), "bands"),
        numpy_helper.from_array(np.zeros(3, np.float32), "zeros"),
        numpy_helper.from_array(LOG_PROBS, "values"),
    ]
    graph = helper.make_graph(nodes, "letter_a", inputs, [output], constants)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)])
