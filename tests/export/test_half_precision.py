"""fp16 programs beside the float32 module, in both formats."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, shape_inference
from torch import Tensor, nn

from export import onnx_program
from export.bundles import PROGRAMS, write_bundle
from export.forced_decisions import run_with_decisions
from export.full_attention import OPERATOR
from export.half_precision import halve
from export.onnx_program import export_onnx
from export.parity import TOLERANCES, measure_parity, row_errors
from export.plan import Plan
from export.planners import make_plan
from export.source import read_source
from export.torchscript_program import export_torchscript
from models.clustered_attention import ClusteredAttention
from models.communities import LearnedCommunities
from models.density_peaks import dpc_knn
from models.thc import ScoredAttention
from models.token_blocks import Ctm
from service.bundle import open_bundle
from service.errors import BundleError
from service.opening import check_golden
from service.runtimes import RUNTIMES
from service.runtimes.onnx import open_onnx
from service.runtimes.torchscript import open_torchscript
from service.sample import Arrays
from tests.export.conftest import make_model, make_source, quiet_exporter
from tests.export.test_brain_network_classifier import CONFIG as THC
from tests.export.test_brain_network_classifier import make_brain_source, make_thc
from tests.export.tiny_pictures import CLASSIFIERS, SEGMENTERS, make_picture_model, make_picture_source
from tests.export.tiny_recogniser import CLUSTERED, CONFIG, FULL, make_recogniser, make_speech_source
from tests.golden_files import REPOSITORY

SHIPPED = sorted(path.parent for path in (REPOSITORY / "bundles").glob("*/manifest.json"))
LENGTHY = ("speech-recognition", "image-segmentation")  # tasks with programs that take half a minute to check
HALF, FULL_PRECISION = TensorProto.FLOAT16, TensorProto.FLOAT
ignore_deprecation = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
MakePlan = Callable[[], Plan]


def plan_pictures(task: str, build: Callable[..., nn.Module]) -> Plan:
    return make_plan(make_picture_source(task), make_picture_model(build))


PLANS: dict[str, MakePlan] = {
    "paca": lambda: make_plan(make_source(), make_model()),
    **{
        f"{name}-classifier": lambda build=build: plan_pictures("image-classification", build)  # type: ignore[misc]
        for name, build in CLASSIFIERS.items()
    },
    **{
        f"{name}-segmenter": lambda build=build: plan_pictures("image-segmentation", build)  # type: ignore[misc]
        for name, build in SEGMENTERS.items()
    },
    "clustered-speech": lambda: make_plan(make_speech_source(CLUSTERED), make_recogniser(CLUSTERED)),
    "full-speech": lambda: make_plan(make_speech_source(FULL), make_recogniser(FULL)),
    "thc": lambda: make_plan(make_brain_source(), make_thc()),
    "thc-centres": lambda: make_plan(make_brain_source(), make_thc(replace(THC, assignment="ocread", encoder="none"))),
}


class ModuleRuntime:
    """A module in the place of a program."""

    name, version, device, kernel, num_streams = "module", "1", "cpu", "portable", 1

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, inputs: Arrays, outputs: Any) -> Arrays:
        found = self.plan.run(inputs)
        return {name: found[name] for name in outputs}

    def close(self) -> None:
        pass


def halve_plan(plan: Plan) -> Plan:
    return replace(plan, program=halve(plan.program))


@pytest.mark.parametrize("name", PLANS)
def test_in_mixed_precision_a_module_gives_nearly_the_same_with_the_same_decisions(name: str) -> None:
    plan = PLANS[name]()
    halved = halve_plan(plan)
    for batch in plan.parity_batches[-2:]:
        found = halved.run(batch)
        expected = run_with_decisions(plan, batch, found)
        for output, array in expected.items():
            assert found[output].dtype == array.dtype, output
            # A top-k mask of communities is decided inside: near its edge a share is there or is not.
            is_masked = name == "thc" and output.startswith("assignment")
            is_near = row_errors(found[output], array) <= TOLERANCES["fp16"]
            assert is_near.mean() >= (0.95 if is_masked else 1), output
        assert any((found[output] != array).any() for output, array in expected.items()), "something was halved"


@pytest.mark.parametrize("name", ["paca", "tcformer-classifier", "clustered-speech", "thc"])
def test_halving_leaves_the_module_as_it_was(name: str) -> None:
    plan = PLANS[name]()
    before = plan.run(plan.golden)
    weights = {key: weight.clone() for key, weight in plan.program.state_dict().items()}
    halved = halve(plan.program)
    assert torch.float16 in {weight.dtype for weight in halved.parameters()}
    assert all(torch.equal(weight, weights[key]) for key, weight in plan.program.state_dict().items())
    for output, array in plan.run(plan.golden).items():
        np.testing.assert_array_equal(array, before[output], strict=True)


def test_the_first_convolution_norms_and_the_last_layer_keep_float32() -> None:
    halved = halve(PLANS["paca"]().program)
    kept = {name.rpartition(".")[0] for name, weight in halved.named_parameters() if weight.dtype == torch.float32}
    modules = dict(halved.named_modules())
    layers = [name for name in kept if isinstance(modules[name], nn.Linear | nn.Conv2d)]
    assert sorted(name.rpartition("backbone.")[2] for name in layers) == [
        "model.model.head",
        "stages.0.downsample.convs.0",
    ]
    assert {name for name, module in modules.items() if isinstance(module, nn.LayerNorm)} <= kept


# Decisions


@pytest.mark.parametrize(
    "name", ["clustered-speech", "tcformer-classifier", "tcformer-v2-reconstruction-classifier", "thc"]
)
def test_decisions_are_made_of_float32_and_as_outside_of_a_program_in_mixed_precision(name: str) -> None:
    plan = halve_plan(PLANS[name]())
    seen: list[Decision] = []
    for module in plan.program.modules():
        if isinstance(module, ClusteredAttention):
            module.operator = Recorder(seen, module.operator)
        elif isinstance(module, Ctm):
            module.clustering = Recorder(seen, module.clustering)
        elif isinstance(module, ScoredAttention | LearnedCommunities):
            module.forward = Recorder(seen, module.forward)
    plan.run(plan.parity_batches[0])
    assert seen
    with torch.inference_mode():
        for decide, inputs, settings, found in seen:
            assert dtypes_of(inputs) == {torch.float32}
            assert dtypes_of(found) <= {torch.float32}
            torch.testing.assert_close(decide(*inputs, **settings), found, rtol=0, atol=0)


Decision = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


def dtypes_of(values: Any) -> set[torch.dtype]:
    """Types of the floating-point tensors among some values."""
    values = (values,) if isinstance(values, Tensor) else values
    return {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}


class Recorder:
    """Remembers what something was called with, and what it gave."""

    def __init__(self, seen: list[Decision], own: Any) -> None:
        self.seen, self.own, self.num_parts = seen, own, getattr(own, "num_parts", None)

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        found = self.own(*inputs, **settings)
        self.seen.append((self.own, inputs, settings, found))
        return found


def test_density_peaks_are_the_same_inside_a_program_in_mixed_precision() -> None:
    x = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))

    class Clusters(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return dpc_knn(x, num_clusters=7).clusters, x @ x.mT

    clusters, products = halve(Clusters().eval())(x)
    assert torch.equal(clusters, dpc_knn(x, num_clusters=7).clusters)
    assert torch.equal(products, x @ x.mT), "two float32 tensors are multiplied in float32"


def test_an_overflow_is_refused() -> None:
    plan = PLANS["paca"]()
    block = next(module for module in plan.program.modules() if hasattr(module, "fc1"))
    with torch.no_grad():
        block.fc1.weight.mul_(2**14)
        block.fc2.weight.mul_(2**-14)
    measure_parity(plan, ModuleRuntime(plan))
    with pytest.raises(ValueError, match=r"differ by nan in logits, in 100\.00% of its rows"):
        measure_parity(plan, ModuleRuntime(halve_plan(plan)), precision="fp16")


# Programs


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, speech_bundle: Path) -> dict[str, tuple[Plan, Path]]:
    """ONNX programs in mixed precision, with the plans of the float32 ones."""
    folder = tmp_path_factory.mktemp("halved")
    (body,) = onnx.load(speech_bundle / PROGRAMS["onnx"], load_external_data=False).functions
    found = {}
    with pytest.MonkeyPatch.context() as patch, quiet_exporter():
        patch.chdir(REPOSITORY)
        # The body is made of the attention's settings alone, and takes longer than all the rest.
        patch.setattr(onnx_program, "make_body", lambda settings, *, opset: body)
        for name in ("tcformer-classifier", "clustered-speech", "full-speech"):
            plan, path = PLANS[name](), folder / f"{name}.onnx"
            export_onnx(halve_plan(plan), path)
            found[name] = plan, path
    return found


@pytest.fixture(scope="module")
def graphs(programs: dict[str, tuple[Plan, Path]]) -> dict[str, ModelProto]:
    """The same with the types of all tensors."""
    return {name: shape_inference.infer_shapes(onnx.load(path)) for name, (_, path) in programs.items()}


def types_of(model: ModelProto, operator: str) -> list[tuple[int, ...]]:
    """Types of the floating-point inputs of all nodes of an operator."""
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return [
        tuple(types[name] for name in node.input if types.get(name) in {HALF, FULL_PRECISION})
        for node in graph.node
        if node.op_type == operator
    ]


def test_hash_planes_meet_float32_queries(graphs: dict[str, ModelProto]) -> None:
    assert types_of(graphs["clustered-speech"], "ClusteredAttention") == [(FULL_PRECISION,) * 4] * CONFIG.num_layers


def test_full_attention_is_one_node_in_float16(graphs: dict[str, ModelProto]) -> None:
    assert types_of(graphs["full-speech"], OPERATOR.split("::")[1]) == [(HALF,) * 3] * CONFIG.num_layers


def test_layers_multiply_in_float16_and_norms_and_decisions_compute_in_float32(graphs: dict[str, ModelProto]) -> None:
    for name, model in graphs.items():
        products = types_of(model, "MatMul")
        assert {frozenset(types) for types in products} == {frozenset({HALF}), frozenset({FULL_PRECISION})}, name
        assert set(types_of(model, "LayerNormalization")) == {(FULL_PRECISION,) * 3}, name
    assert types_of(graphs["clustered-speech"], "MatMul").count((FULL_PRECISION,) * 2) == 1, "the last layer alone"
    for operator in ("TopK", "ArgMin", "ArgMax", "Exp"):
        assert HALF not in {kind for kinds in types_of(graphs["tcformer-classifier"], operator) for kind in kinds}
    assert types_of(graphs["tcformer-classifier"], "TopK"), "density peaks are in the program"


@pytest.mark.parametrize("name", ["tcformer-classifier", "clustered-speech", "full-speech"])
def test_an_onnx_program_passes_the_gates(programs: dict[str, tuple[Plan, Path]], name: str) -> None:
    plan, path = programs[name]
    runtime = open_onnx(path, device="cpu")
    parity = measure_parity(plan, runtime, precision="fp16")
    assert max(parity.max_relative_error.values()) > 1e-5, "something was halved"
    runtime.close()


@ignore_deprecation
@pytest.mark.parametrize("name", ["clustered-speech", pytest.param("tcformer-classifier", marks=pytest.mark.slow)])
def test_a_torchscript_program_passes_the_gates(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]()
    with quiet_exporter():
        export_torchscript(halve_plan(plan), tmp_path / "model.pt")
    runtime = open_torchscript(tmp_path / "model.pt", device="cpu")
    parity = measure_parity(plan, runtime, precision="fp16")
    assert max(parity.max_relative_error.values()) > 1e-5, "something was halved"
    runtime.close()


@ignore_deprecation
def test_a_bundle_in_fp16_proves_itself_with_the_float32_module_s_outputs(tmp_path: Path) -> None:
    source, out = make_source(), tmp_path / "bundle"
    with quiet_exporter():
        manifest = write_bundle(source, make_model(), out, runtimes=list(PROGRAMS), precision="fp16")
    bundle = open_bundle(out)
    assert bundle.manifest == manifest
    assert (manifest.precision, manifest.programs, manifest.parity.share_of_rows_off) == ("fp16", PROGRAMS, {})
    inputs, golden = bundle.read_golden()
    expected = make_plan(source, make_model()).run(inputs)
    assert set(golden) == {"logits", "clusters_stage1", "evidence"}
    for output, array in golden.items():
        np.testing.assert_array_equal(array, expected[output])
    for name, program in PROGRAMS.items():
        runtime = RUNTIMES[name](out / program, device="cpu")
        check_golden(runtime, bundle, inputs, golden)
        found = runtime.run(inputs, ["logits"])["logits"]
        tolerances = manifest.golden.atol_by_output
        assert 0 < abs(found - golden["logits"]).max() <= tolerances["logits"]
        for output, array in golden.items():
            for spoiled in (array + np.float32(3 * tolerances[output]), np.zeros_like(array)):
                with pytest.raises(BundleError, match=f": {output} differs from golden"):
                    check_golden(runtime, bundle, inputs, golden | {output: spoiled})
        runtime.close()


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(f, id=f.name, marks=[pytest.mark.slow] if open_bundle(f).manifest.task in LENGTHY else [])
        for f in SHIPPED
    ],
)
def test_a_shipped_model_passes_the_gates_in_mixed_precision(folder: Path) -> None:
    plan = make_plan(*read_source(folder))
    parity = measure_parity(plan, ModuleRuntime(halve_plan(plan)), precision="fp16")
    assert max(parity.max_relative_error.values()) > 1e-5, "something was halved"
