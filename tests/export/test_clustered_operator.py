"""Gates 1 to 3 of parity: with bits that no rounding decides, clusters are the same and the rest is within 1e-5.

The fourth, what becomes of natural recordings, is the parity that a bundle states.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from export.bundles import PROGRAM
from export.clustered_operator import DOMAIN, INPUTS, NAME, OUTPUTS, VERSION, add_body, as_operators, make_body
from export.onnx_program import OPSET
from models.clustered_attention import ClusteredAttention, ClusteredAttentionConfig, attend
from tests.export.conftest import quiet_exporter
from tests.export.tiny_recogniser import CLUSTERED, CONFIG, FULL, make_recogniser

CLEAR = 2e-5  # of the planes: no order of float32 sums moves a projection so far
OF_BUNDLE = {"num_clusters": 8, "num_iterations": 2, "top_k": 8, "scale": 0.25, "metric": "lsh", "full_below": 200}
SETTINGS: dict[str, dict[str, Any]] = {
    "improved": OF_BUNDLE,
    "l2": OF_BUNDLE | {"metric": "l2", "full_below": 0, "num_clusters": 6, "scale": 0.31},
    "plain": OF_BUNDLE | {"top_k": 0, "full_below": 0},
}


@pytest.fixture(scope="module", params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETTINGS[request.param]


@pytest.fixture(scope="module")
def session(settings: dict[str, Any], speech_bundle: Path) -> onnxruntime.InferenceSession:
    """One node in stock ONNX Runtime; "improved" has the very body of the recogniser's program."""
    if settings is OF_BUNDLE:
        (body,) = onnx.load(speech_bundle / PROGRAM).functions
    else:
        with quiet_exporter():
            body = make_body(settings, opset=OPSET)
    program = make_node_program(settings)
    add_body(program, body)
    return onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])


def make_node_program(settings: dict[str, Any]) -> onnx.ModelProto:
    shapes = [["b", "h", "n", "e"], ["b", "h", "s", "e"], ["b", "h", "s", "d"], ["p", "f"], ["b"], ["b"]]
    types = [TensorProto.FLOAT] * 4 + [TensorProto.INT64] * 2
    graph = helper.make_graph(
        [helper.make_node(NAME, INPUTS, OUTPUTS, domain=DOMAIN, **settings)],
        "attention",
        [helper.make_tensor_value_info(*value) for value in zip(INPUTS, types, shapes, strict=True)],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", "h", "n", "d"]),
            helper.make_tensor_value_info("clusters", TensorProto.INT32, ["b", "h", "n"]),
        ],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def make_inputs(shape: tuple[int, ...], lengths: list[int], key_lengths: list[int]) -> list[Tensor]:
    """Random inputs, B, H, N, S, E, D, P long; no query is near a hash plane."""
    B, H, N, S, E, D, P = shape
    rng = torch.Generator().manual_seed(N)
    q, k, v = (torch.randn(B, H, *size, generator=rng) for size in ((N, E), (S, E), (S, D)))
    planes = torch.randn(P, E + 1, generator=rng)
    while (near := ((q @ planes[:, :-1].T - planes[:, -1]).abs() <= CLEAR).any(dim=-1)).any():
        q[near] = torch.randn(int(near.sum()), E, generator=rng)
    return [q, k, v, planes, torch.tensor(lengths), torch.tensor(key_lengths)]


# B, H, N, S, E, D, P: none but the first has a size that the body was exported with.
@pytest.mark.parametrize(
    ("shape", "lengths", "key_lengths"),
    [
        ((1, 1, 1, 1, 16, 24, 8), [1], [1]),
        ((3, 2, 80, 33, 8, 12, 16), [80, 41, 1], [7, 33, 0]),
        ((1, 4, 301, 301, 40, 40, 63), [301], [301]),
        ((4, 1, 260, 230, 20, 10, 64), [260, 199, 201, 130], [230, 199, 30, 201]),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_the_body_computes_what_the_function_does_in_all_shapes(
    session: onnxruntime.InferenceSession,
    settings: dict[str, Any],
    shape: tuple[int, ...],
    lengths: list[int],
    key_lengths: list[int],
) -> None:
    inputs = make_inputs(shape, lengths, key_lengths)
    out, clusters = attend(*inputs, **settings)
    feeds = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True)}
    found, found_clusters = session.run(list(OUTPUTS), feeds)
    assert found_clusters.dtype == np.int32
    np.testing.assert_array_equal(found_clusters, clusters.numpy())
    np.testing.assert_allclose(found, out.numpy(), atol=1e-5, rtol=0)  # float32 sums in another order


def test_what_stands_at_padding_changes_nothing(session: onnxruntime.InferenceSession) -> None:
    inputs = make_inputs((2, 2, 230, 220, 16, 16, 16), [230, 90], [220, 95])
    feeds = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=True)}
    out, clusters = session.run(list(OUTPUTS), feeds)
    feeds["q"][1, :, 90:], feeds["k"][1, :, 95:], feeds["v"][1, :, 95:] = 1e6, np.nan, np.inf
    again, same_clusters = session.run(list(OUTPUTS), feeds)
    np.testing.assert_array_equal(again, out)
    np.testing.assert_array_equal(same_clusters, clusters)


def test_a_program_has_one_node_for_each_layer_and_one_body(speech_bundle: Path) -> None:
    program = onnx.load(speech_bundle / PROGRAM)
    nodes = [node for node in program.graph.node if node.domain]
    assert [(node.domain, node.op_type) for node in nodes] == [(DOMAIN, NAME)] * CONFIG.num_layers
    for node in nodes:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes.pop("metric") == b"lsh"
        assert attributes == {name: value for name, value in OF_BUNDLE.items() if name != "metric"}
    assert [(function.domain, function.name) for function in program.functions] == [(DOMAIN, NAME)]
    assert {opset.domain: opset.version for opset in program.opset_import} == {"": OPSET, DOMAIN: VERSION}
    assert {node.domain for node in program.functions[0].node} == {""}, "the body is made of standard operators"


class Pair(nn.Module):
    def __init__(self, *configs: ClusteredAttentionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClusteredAttention(config, head_dim=4, seed=1) for config in configs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 3}, "clustered attentions differ in their settings"),
        ({"scale": 0.25}, "clustered attentions differ in their settings"),
        ({"is_causal": True}, "the operator has no causal kind"),
    ],
)
def test_attentions_that_one_body_cannot_compute_are_refused(change: dict[str, Any], message: str) -> None:
    config = ClusteredAttentionConfig(num_clusters=8, top_k=8)
    model = Pair(config, replace(config, **change))
    with pytest.raises(ValueError, match=message), as_operators(model):
        pass
    assert all(layer.operator is attend for layer in model.layers)


def test_hash_planes_of_their_own_are_no_difference() -> None:
    model = make_recogniser(CLUSTERED)
    planes = [module.planes for module in model.modules() if isinstance(module, ClusteredAttention)]
    assert not torch.equal(*planes)
    with as_operators(model) as settings:
        assert settings == OF_BUNDLE


def test_after_the_export_the_model_computes_again_even_if_it_failed() -> None:
    model = make_recogniser(CLUSTERED)
    x, lengths = torch.zeros(1, 20, CONFIG.num_mels), torch.tensor([20])
    expected, _ = model(x, lengths)
    with pytest.raises(RuntimeError, match="the export failed"), as_operators(model):
        raise RuntimeError("the export failed")
    found, _ = model(x, lengths)
    assert torch.equal(found, expected)


def test_a_model_without_clustered_attention_has_no_settings() -> None:
    with as_operators(make_recogniser(FULL)) as settings:
        assert settings is None
