import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.bundles import PROGRAM
from export.onnx_program import MIN_HALVED, OPSET, _halve
from export.pictures import cut_crops
from export.plan import EXPORT_BATCH
from export.planners import make_plan
from export.source import WEIGHTS, read_source
from service.bundle import open_bundle
from service.runtimes.onnx import OPERATORS, open_onnx
from service.tasks.image_classification import ImageClassificationSpec
from tests.golden_files import REPOSITORY

SHIPPED = sorted(path.parent for path in (REPOSITORY / "bundles").glob("*/manifest.json"))
TRACES = re.compile(rb"/(home|root|usr|tmp|opt|work|mnt|Users)/|site-packages|\.py\b|Traceback|File \"|stack_trace")


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_program_equals_the_module_at_batch_sizes_not_used_for_the_export(bundle_folder: Path, batch: int) -> None:
    assert batch != EXPORT_BATCH
    source, model = read_source(bundle_folder)
    plan = make_plan(source, model)
    images = cut_crops(ImageClassificationSpec.model_validate(source.spec), batch)
    assert plan.output_names == ("logits", "clusters_stage1", "evidence")
    runtime = open_onnx(bundle_folder / PROGRAM, device="cpu")
    found = runtime.run({"image": images}, plan.output_names)
    for name, expected in plan.run({"image": images}).items():
        tolerance = 1e-5 * np.abs(expected).max()  # float32 in another order
        np.testing.assert_allclose(found[name], expected, atol=tolerance, rtol=0)
    runtime.close()


def test_a_program_needs_nothing_but_stock_onnx_runtime(bundle_folder: Path) -> None:
    model = onnx.load(bundle_folder / PROGRAM, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    named = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert named == {WEIGHTS}, "beside itself a program reads the bundle's weights alone"


@pytest.mark.parametrize("bundle", ["bundle_folder", "speech_bundle", "full_speech_bundle"])
def test_a_program_tells_nothing_of_the_machine_that_exported(bundle: str, request: pytest.FixtureRequest) -> None:
    check_for_traces(request.getfixturevalue(bundle) / PROGRAM)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_program_tells_nothing_of_the_machine_that_exported(folder: Path) -> None:
    check_for_traces(folder / open_bundle(folder).manifest.programs["onnx"])


def check_for_traces(path: Path) -> None:
    model = onnx.load(path)
    graph = model.graph
    nodes = [*graph.node, *(node for function in model.functions for node in function.node)]
    constants = [attribute.t for node in nodes for attribute in node.attribute if attribute.HasField("t")]
    for tensor in (*graph.initializer, *constants):
        tensor.ClearField("raw_data")  # numbers spell anything
    parts = (*nodes, *model.functions, *graph.input, *graph.output, *graph.initializer, *constants)
    assert {entry.key for entry in model.metadata_props} <= {OPERATORS}
    for part in (graph, *parts):
        assert not part.metadata_props
    for part in (model, graph, *parts):
        assert not part.doc_string
    assert TRACES.findall(model.SerializeToString()) == []


# Halving


def make_matrix(values: np.ndarray) -> onnx.ModelProto:
    """A program that multiplies `x` (1, N) with a constant (N, M)."""
    rows, columns = values.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])
    weight = numpy_helper.from_array(values, "weight")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "matrix", [x], [y], [weight])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)])


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x})
    return np.asarray(y)


def random_halves(*shape: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    values.flat[:5] = [65504, -65504, 6e-8, -0.0, 2**-14]  # the limits of float16
    return values.astype(np.float32)


def test_halved_weights_give_the_same_numbers_to_the_last_bit() -> None:
    weights = random_halves(32, 16)
    model = make_matrix(weights)
    x = np.random.default_rng(1).standard_normal((1, 32)).astype(np.float32)
    expected = run(model, x)
    size = model.ByteSize()
    _halve(model)
    onnx.checker.check_model(model, full_check=True)
    (half,) = model.graph.initializer
    assert half.data_type == TensorProto.FLOAT16
    stored = numpy_helper.to_array(half).astype(np.float32)
    np.testing.assert_array_equal(stored.view(np.uint32), weights.view(np.uint32))
    np.testing.assert_array_equal(run(model, x).view(np.uint32), expected.view(np.uint32))
    assert model.ByteSize() < 0.6 * size


@pytest.mark.parametrize("value", [1 / 3, 65520.0, 1e-9, np.nan])
def test_one_weight_that_float16_does_not_hold_keeps_its_tensor_whole(value: float) -> None:
    weights = random_halves(32, 16)
    weights[31, 15] = value
    model = make_matrix(weights)
    before = model.SerializeToString()
    _halve(model)
    assert model.SerializeToString() == before


def test_small_constants_and_integers_stay_as_they_are() -> None:
    small = make_matrix(random_halves(MIN_HALVED - 1, 1))
    integers = make_matrix(random_halves(32, 16))
    integers.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((32, 16), np.int64), "weight"))
    for model in (small, integers):
        before = model.SerializeToString()
        _halve(model)
        assert model.SerializeToString() == before
