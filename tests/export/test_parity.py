from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.bundles import PROGRAM
from export.forced_decisions import run_with_decisions
from export.parity import MAX_RELATIVE_ERROR, MAX_SHARE_OFF_FP16, TOLERANCES, measure_parity, row_errors
from export.plan import BATCH_SIZES, EXPORT_BATCH, Plan
from export.planners import make_plan
from export.source import read_source
from service.bundle import TensorSpec
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays
from tests.export.tiny_pictures import CLASSIFIERS, make_picture_model, make_picture_source
from tests.export.tiny_recogniser import CLUSTERED, CONFIG, make_recogniser, make_speech_source

assert CONFIG.attention is not None
NUM_CLUSTERS = CONFIG.attention.num_clusters


@pytest.fixture(scope="module")
def runtime(bundle_folder: Path) -> OnnxRuntime:
    return open_onnx(bundle_folder / PROGRAM, device="cpu")


@pytest.fixture
def plan(bundle_folder: Path) -> Plan:
    return make_plan(*read_source(bundle_folder))


class SpoiledRuntime:
    """Spoils the outputs of another."""

    name, version, device, kernel, num_streams = "spoiled", "1", "cpu", "portable", 1

    def __init__(self, runtime: Callable[[Arrays], Arrays], spoil: Callable[[Arrays], Arrays]) -> None:
        self.runtime, self.spoil = runtime, spoil

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        return self.spoil({name: self.runtime(inputs)[name] for name in outputs})

    def close(self) -> None:
        pass


def spoil_one(value: float, size: int) -> Callable[[Arrays], Arrays]:
    """Puts a value into one row of the batches of one size."""

    def spoil(found: Arrays) -> Arrays:
        if len(found["logits"]) == size:
            found["logits"][-1, 0] = value
        return found

    return spoil


def test_parity_is_measured_for_every_output(plan: Plan, runtime: OnnxRuntime) -> None:
    parity = measure_parity(plan, runtime)
    assert list(parity.max_relative_error) == ["logits", "clusters_stage1", "evidence"]
    assert all(0 <= error <= MAX_RELATIVE_ERROR for error in parity.max_relative_error.values())
    assert parity.batch_sizes == BATCH_SIZES
    assert EXPORT_BATCH not in BATCH_SIZES
    assert parity.share_of_rows_off == {}


@torch.no_grad()
def test_a_module_with_one_other_weight_is_refused(plan: Plan, runtime: OnnxRuntime) -> None:
    plan.program.get_parameter("model.model.head.bias")[0] += 1e-2
    with pytest.raises(ValueError, match=r"program and module differ by .* in logits, in 100.00% of its rows"):
        measure_parity(plan, runtime)


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("value", [1e6, np.nan, np.inf])
def test_one_wrong_row_in_one_batch_is_refused(plan: Plan, runtime: OnnxRuntime, size: int, value: float) -> None:
    spoiled = SpoiledRuntime(lambda inputs: runtime.run(inputs, plan.output_names), spoil_one(value, size))
    with pytest.raises(ValueError, match="in logits"):
        measure_parity(plan, spoiled)


def test_an_output_of_another_shape_is_refused(plan: Plan, runtime: OnnxRuntime) -> None:
    spoiled = SpoiledRuntime(
        lambda inputs: runtime.run(inputs, plan.output_names),
        lambda found: found | {"logits": found["logits"][:, :-1]},
    )
    with pytest.raises(ValueError, match=r"shape \(1, 4\), expected \(1, 5\)"):
        measure_parity(plan, spoiled)


# Rows that may be off


class Echo(nn.Module):
    """Gives its input and, in whole numbers, which of it is positive."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.clone(), (x > 0).int()


def make_echo_plan(max_share_off: float) -> Plan:
    """Two batches of 4 · 5 rows of 3 numbers, of which 10 % of the rows and of the whole numbers may be off."""
    rng = np.random.default_rng(0)
    return Plan(
        program=Echo(),
        spec={},
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 5, 3)),),
        outputs=(
            TensorSpec(name="echo", dtype="float32", shape=("batch", 5, 3)),
            TensorSpec(name="sign", dtype="int32", shape=("batch", 5, 3)),
        ),
        example={},
        golden={},
        parity_inputs="noise",
        parity_batches=tuple({"x": rng.standard_normal((4, 5, 3)).astype(np.float32)} for _ in range(2)),
        max_share_off=max_share_off,
    )


def spoil_rows(number: int, value: float) -> Callable[[Arrays], Arrays]:
    """Changes two numbers in each of the first rows of every batch, and as many whole numbers."""

    def spoil(found: Arrays) -> Arrays:
        found["echo"].reshape(-1, 3)[:number, :2] += np.float32(value)
        found["sign"].flat[:number] += 1
        return found

    return spoil


def test_rows_that_are_off_are_counted_and_left_out_of_the_error() -> None:
    plan = make_echo_plan(0.1)
    parity = measure_parity(plan, SpoiledRuntime(plan.run, spoil_rows(2, 1.0)))
    assert parity.share_of_rows_off == {"echo": pytest.approx(2 / 20), "sign": pytest.approx(2 / 60)}
    assert parity.max_relative_error == {"echo": 0.0, "sign": 0.0}


@pytest.mark.parametrize(("number", "value"), [(3, 1.0), (3, np.nan), (3, np.inf)])
def test_more_rows_off_than_allowed_are_refused(number: int, value: float) -> None:
    plan = make_echo_plan(0.1)
    with pytest.raises(ValueError, match=r"in echo, in 15.00% of its rows; allowed is 1e-05, and more in at most 10"):
        measure_parity(plan, SpoiledRuntime(plan.run, spoil_rows(number, value)))


def test_where_no_row_may_be_off_one_decision_is_too_much() -> None:
    plan = make_echo_plan(0.0)

    def spoil(found: Arrays) -> Arrays:
        found["sign"].flat[7] += 1
        return found

    with pytest.raises(ValueError, match="in sign"):
        measure_parity(plan, SpoiledRuntime(plan.run, spoil))


def test_the_error_is_relative_to_the_largest_magnitude() -> None:
    expected = np.array([[1.0, -4.0], [2.0, 1.0]], np.float32)
    errors = row_errors(expected + np.array([[0, 0], [0.5, 0.25]], np.float32), expected)
    np.testing.assert_array_equal(errors, [0, 0.125])


def test_of_ids_one_that_is_the_next_is_as_wrong_as_any_other() -> None:
    expected = np.arange(196).reshape(4, 49)  # as many cells as TCFormer has; 1 is under a hundredth of 195
    np.testing.assert_array_equal(row_errors(expected, expected), np.zeros(196))
    np.testing.assert_array_equal(row_errors(expected + 1, expected), np.ones(196))


def test_where_zeros_are_expected_errors_are_absolute() -> None:
    expected = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(row_errors(expected, expected), [0, 0])
    np.testing.assert_array_equal(row_errors(expected + np.array([[0], [0.5]], np.float32), expected), [0, 0.5])


# Programs in float16


@pytest.fixture(scope="module")
def speech_plan() -> Plan:
    return make_plan(make_speech_source(CLUSTERED), make_recogniser(CLUSTERED))


def spoil_clusters(plan: Plan, share: float) -> Callable[[Arrays, Arrays], Arrays]:
    """Moves a share of the clustered queries to the next cluster, and computes all else accordingly."""

    def spoil(inputs: Arrays, found: Arrays) -> Arrays:
        clusters = found["clusters"].copy()
        is_clustered = (clusters >= 0) & (clusters < NUM_CLUSTERS)
        is_moved = is_clustered & (np.random.default_rng(0).random(clusters.shape) < share)
        clusters[is_moved] = (clusters[is_moved] + 1) % NUM_CLUSTERS
        return run_with_decisions(plan, inputs, {"clusters": clusters})

    return spoil


class SpoiledPlan(SpoiledRuntime):
    """A module whose outputs are spoiled, knowing its inputs."""

    def __init__(self, plan: Plan, spoil_one: Callable[[Arrays, Arrays], Arrays]) -> None:
        super().__init__(lambda inputs: spoil_one(inputs, plan.run(inputs)), lambda found: found)


@pytest.mark.parametrize("name", ["speech", "tcformer", "tcformer-v2-reconstruction"])
def test_with_a_module_s_own_decisions_it_gives_its_own_outputs(speech_plan: Plan, name: str) -> None:
    plan = speech_plan
    if name != "speech":
        plan = make_plan(make_picture_source("image-classification"), make_picture_model(CLASSIFIERS[name]))
    for batch in plan.parity_batches:
        expected = plan.run(batch)
        for output, array in run_with_decisions(plan, batch, expected).items():
            np.testing.assert_allclose(array, expected[output], atol=1e-5 * np.abs(expected[output]).max(), rtol=0)


def test_with_other_decisions_it_gives_other_outputs_and_then_its_own_again(speech_plan: Plan) -> None:
    batch = speech_plan.parity_batches[-2]
    expected = speech_plan.run(batch)
    found = spoil_clusters(speech_plan, 0.5)(batch, expected)
    assert row_errors(found["log_probs"], expected["log_probs"]).max() > TOLERANCES["fp16"]
    for name, array in speech_plan.run(batch).items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_program_in_fp16_may_decide_otherwise_if_all_else_follows_from_it(speech_plan: Plan) -> None:
    parity = measure_parity(speech_plan, SpoiledPlan(speech_plan, spoil_clusters(speech_plan, 0.01)), precision="fp16")
    assert 0 < parity.share_of_rows_off["clusters"] <= MAX_SHARE_OFF_FP16
    assert max(parity.max_relative_error.values()) <= 1e-5


def test_a_program_in_fp16_that_decides_too_much_otherwise_is_refused(speech_plan: Plan) -> None:
    runtime = SpoiledPlan(speech_plan, spoil_clusters(speech_plan, 0.9))
    with pytest.raises(ValueError, match=r"allowed is 1e-02, and more in at most 15\.00%"):
        measure_parity(speech_plan, runtime, precision="fp16")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_one_row_that_does_not_follow_from_a_program_s_decisions_is_refused(speech_plan: Plan, value: float) -> None:
    def spoil(inputs: Arrays, found: Arrays) -> Arrays:
        found["log_probs"][0, 3, 1] += np.float32(value)
        return found

    with pytest.raises(ValueError, match=r"in log_probs, .* more in at most 0\.00%"):
        measure_parity(speech_plan, SpoiledPlan(speech_plan, spoil), precision="fp16")


@pytest.mark.parametrize(("error", "is_allowed"), [(0.005, True), (0.02, False)])
def test_the_tolerance_is_that_of_the_precision(plan: Plan, error: float, is_allowed: bool) -> None:
    def spoil(inputs: Arrays, found: Arrays) -> Arrays:
        found["logits"][-1, 0] += np.float32(error * np.abs(found["logits"]).max())
        return found

    spoiled = SpoiledPlan(plan, spoil)
    if is_allowed:
        parity = measure_parity(plan, spoiled, precision="fp16")
        assert parity.max_relative_error["logits"] == pytest.approx(error, rel=1e-3)
    else:
        with pytest.raises(ValueError, match="in logits"):
            measure_parity(plan, spoiled, precision="fp16")
    with pytest.raises(ValueError, match="in logits"):
        measure_parity(plan, spoiled)
