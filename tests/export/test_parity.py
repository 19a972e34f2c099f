from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.bundles import PROGRAM
from export.parity import MAX_RELATIVE_ERROR, measure_parity, row_errors
from export.plan import BATCH_SIZES, EXPORT_BATCH, Plan
from export.planners import make_plan
from export.source import read_source
from service.bundle import TensorSpec
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays


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
