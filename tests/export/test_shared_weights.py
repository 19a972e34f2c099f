from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from export.bundles import PROGRAM
from export.shared_weights import MIN_BYTES, read_places, share_weights

RNG = np.random.default_rng(5)
AS_SAVED = RNG.standard_normal((24, 40)).astype(np.float16)
TURNED = RNG.standard_normal((40, 32)).astype(np.float32)
OTHER = RNG.standard_normal((24, 32)).astype(np.float32)
SMALL = RNG.standard_normal((1, 32)).astype(np.float32)


def make_program() -> onnx.ModelProto:
    """(B, 24) → (B, 32) through three matrices, in whose shapes and types weights come."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["saved.half"], ["saved"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "saved"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "turned"], ["a"]),
            helper.make_node("MatMul", ["x", "other"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["c"]),
            helper.make_node("Add", ["c", "small"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [
            numpy_helper.from_array(AS_SAVED, "saved.half"),
            numpy_helper.from_array(TURNED, "turned"),
            numpy_helper.from_array(OTHER, "other"),
            numpy_helper.from_array(SMALL, "small"),
        ],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    ids = np.arange(600)
    save_file({"a": AS_SAVED, "b": np.ascontiguousarray(TURNED.T), "c": SMALL, "ids": ids}, path)
    return path


def test_a_program_computes_the_same_with_weights_of_the_file(weights: Path) -> None:
    x = RNG.standard_normal((3, 24)).astype(np.float32)
    model = make_program()
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    share_weights(model, weights)
    path = weights.with_name("model.onnx")
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path, full_check=True)
    np.testing.assert_array_equal(onnxruntime.InferenceSession(path).run(None, {"x": x})[0], expected)


def test_only_what_stands_in_the_file_and_is_large_leaves_the_program(weights: Path) -> None:
    model = make_program()
    share_weights(model, weights)
    shared = {tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    assert shared == {"saved.half", "turned.turned"}
    assert SMALL.nbytes < MIN_BYTES < OTHER.nbytes
    assert model.ByteSize() < OTHER.nbytes + 1000


def test_places_are_those_of_the_numbers(weights: Path) -> None:
    places = read_places(weights)
    content = weights.read_bytes()
    place = places[TensorProto.FLOAT16, AS_SAVED.tobytes()]
    assert content[place.offset : place.offset + place.length] == AS_SAVED.tobytes()
    assert len(places) == 3, "integers are not looked for"


def test_a_bundle_holds_its_weights_once(bundle_folder: Path) -> None:
    # What is left in a model this small are mostly vectors, each too short to be worth a reference.
    program = onnx.load(bundle_folder / PROGRAM, load_external_data=False)
    own = sum(len(tensor.raw_data) for tensor in program.graph.initializer)
    everything = onnx.load(bundle_folder / PROGRAM)
    assert own < 0.4 * sum(len(tensor.raw_data) for tensor in everything.graph.initializer)
