from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from torch import from_numpy
from torch.testing import assert_close

from tests.export.native_operator import (
    DEFAULTS,
    DOMAIN,
    NEEDS_COMPILER,
    OUTPUTS,
    check_equals_oracle,
    make_inputs,
    make_model,
    on_each_tier,
    open_session,
    run,
    supported_tiers,
)

pytestmark = NEEDS_COMPILER


def test_the_domain_without_a_tier_has_the_best_one() -> None:
    best = supported_tiers()[-1]
    inputs = make_inputs((1, 2, 80, 90, 20, 20, 40), None, None)
    for found, expected in zip(run(inputs), run(inputs, domain=f"{DOMAIN}.{best}"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_library_takes_the_place_of_a_body_in_the_program() -> None:
    model = onnx.load_from_string(make_model(DEFAULTS))
    body = [
        helper.make_node("Sub", ["v", "v"], ["out"]),  # zeros, of another shape in general
        helper.make_node("ReduceSum", ["out"], ["sum"], keepdims=0),
        helper.make_node("Expand", ["sum", "shape"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["clusters"], to=TensorProto.INT32),
    ]
    shape = helper.make_node("Constant", [], ["shape"], value_ints=[1, 1, 1])
    names = [value.name for value in model.graph.input]
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(
        helper.make_function(DOMAIN, "ClusteredAttention", names, OUTPUTS, [shape, *body], opsets, list(DEFAULTS))
    )
    inputs = make_inputs((1, 2, 40, 50, 16, 16, 16), None, None)
    portable = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert not portable.run(OUTPUTS, inputs)[0].any()
    check_equals_oracle(open_session(model.SerializeToString()).run(OUTPUTS, inputs), inputs)


@pytest.mark.parametrize("sizes", [(0, 2, 9, 9, 4, 4, 3), (2, 0, 9, 9, 4, 4, 3), (2, 2, 0, 9, 4, 4, 3)], ids=str)
def test_nothing_gives_nothing(sizes: tuple[int, ...]) -> None:
    B, H, N, *_, D, _ = sizes
    out, clusters = run(make_inputs(sizes, None, None))
    assert out.shape == (B, H, N, D)
    assert clusters.shape == (B, H, N)


@on_each_tier
def test_no_keys_or_no_head_dimensions_give_zeros(tier: str) -> None:
    out, clusters = run(make_inputs((2, 2, 9, 0, 4, 4, 3), None, None), domain=tier)
    assert not out.any()
    assert clusters.max() < DEFAULTS["num_clusters"]
    out, _ = run(make_inputs((2, 2, 9, 9, 4, 0, 3), None, None), domain=tier)
    assert out.shape == (2, 2, 9, 0)
    inputs = make_inputs((2, 2, 9, 9, 0, 4, 3), None, None)  # every score is 0
    out, _ = run(inputs, domain=tier)
    assert_close(
        from_numpy(out), from_numpy(inputs["v"].mean(axis=2, keepdims=True)).expand(2, 2, 9, 4), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_clusters", 0, "attribute num_clusters=0 must lie in"),
        ("num_clusters", 2**31, "attribute num_clusters=2147483648 must lie in"),
        ("num_iterations", 0, "attribute num_iterations=0 must lie in"),
        ("top_k", -1, "attribute top_k=-1 must lie in"),
        ("full_below", -1, "attribute full_below=-1 must lie in"),
        ("scale", 0.0, "attribute scale=0.000000 must be positive and finite"),
        ("scale", float("inf"), "attribute scale=inf must be positive and finite"),
        ("scale", float("nan"), "attribute scale=-?nan must be positive and finite"),
        ("metric", "cosine", "attribute metric=cosine must be lsh or l2"),
        ("metric", "", "attribute metric= must be lsh or l2"),
        ("metric", 3, "attribute metric is missing or has another type"),
        ("top_k", 1.5, "attribute top_k is missing or has another type"),
        ("scale", None, "attribute scale is missing or has another type"),
        ("num_clusters", None, "attribute num_clusters is missing or has another type"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any, message: str) -> None:
    attributes = {key: x for key, x in (DEFAULTS | {name: value}).items() if x is not None}
    with pytest.raises(Exception, match=f"ClusteredAttention: {message}"):
        open_session(make_model(attributes))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", np.zeros((2, 3, 8), np.float32), r"input q has shape \(2, 3, 8\); expected \(B, H, N, E\)"),
        ("k", np.zeros((2, 3, 9, 5), np.float32), r"input k has shape .* expected \(B, H, S, E\) = \(2, 3, 9, 4\)"),
        ("k", np.zeros((2, 1, 9, 4), np.float32), r"input k has shape .* = \(2, 3, 9, 4\)"),
        ("v", np.zeros((2, 3, 8, 4), np.float32), r"input v has shape .* = \(2, 3, 9, 4\)"),
        ("v", np.zeros((1, 3, 9, 4), np.float32), r"input v has shape .* = \(2, 3, 9, 4\)"),
        ("planes", np.zeros((5, 4), np.float32), r"input planes has shape \(5, 4\); .* = \(5, 5\)"),
        ("planes", np.zeros((0, 5), np.float32), "input planes has 0 rows; metric lsh takes 1 to 64"),
        ("planes", np.zeros((65, 5), np.float32), "input planes has 65 rows; metric lsh takes 1 to 64"),
        ("planes", np.zeros(5, np.float32), r"input planes has shape \(5\); expected \(P, E \+ 1\)"),
        ("query_lengths", np.array([8]), r"input query_lengths has shape \(1\); expected \(B,\) = \(2\)"),
        ("key_lengths", np.array([[9, 9]]), r"input key_lengths has shape \(1, 2\); expected \(B,\) = \(2\)"),
        ("query_lengths", np.array([8, 9]), r"query_lengths\[1\]=9 must lie in \[0, 8\]"),
        ("key_lengths", np.array([-1, 9]), r"key_lengths\[0\]=-1 must lie in \[0, 9\]"),
    ],
    ids=lambda x: "x".join(map(str, x.shape)) if isinstance(x, np.ndarray) else str(x)[:13],
)
def test_inputs_that_do_not_fit_are_refused(name: str, value: np.ndarray, message: str) -> None:
    inputs = make_inputs((2, 3, 8, 9, 4, 4, 3), None, None) | {name: value}
    ranks = tuple(array.ndim for array in inputs.values())
    session = open_session(make_model(DEFAULTS, ranks=ranks))
    with pytest.raises(Exception, match=f"ClusteredAttention: {message}"):
        session.run(OUTPUTS, inputs)


def test_a_call_that_needs_more_memory_than_there_is_is_refused() -> None:
    inputs = make_inputs((1, 1, 1, 1, 2**20, 1, 0), None, None)
    with pytest.raises(Exception, match="ClusteredAttention: out of memory; send shorter or fewer samples"):
        run(inputs, num_clusters=2**31 - 2, metric="l2")  # centroids of 2^53 bytes: more than can be addressed
