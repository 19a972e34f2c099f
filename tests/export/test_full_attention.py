from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from export.bundles import PROGRAM
from export.full_attention import OPERATOR, VERSION, as_fused_nodes
from export.onnx_program import OPSET
from models.attention import FullAttention
from tests.export.conftest import quiet_exporter
from tests.export.tiny_recogniser import CONFIG

H, E, D = 3, 8, 12


class Attending(nn.Module):
    """Full attention, and nothing else, that has a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = FullAttention(scale=0.7)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return self.attention(q, k, v, lengths, lengths)[0]


def make_inputs(lengths: list[int]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(len(lengths))
    sizes = {"q": E, "k": E, "v": D}
    heads = {name: torch.randn(len(lengths), H, max(lengths), size, generator=rng) for name, size in sizes.items()}
    return heads | {"lengths": torch.tensor(lengths)}


def test_the_node_computes_what_the_module_does() -> None:
    module, inputs = Attending().eval(), make_inputs([9, 8])
    batch, tokens = Dim("batch"), Dim("tokens")
    with as_fused_nodes(module), quiet_exporter():
        exported = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            dynamic_shapes=(*({0: batch, 2: tokens},) * 3, {0: batch}),
            verbose=False,
        )
    assert exported is not None
    program = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    for lengths in ([1], [70], [33, 5, 40, 1]):
        inputs = make_inputs(lengths)
        expected = module(*inputs.values()).numpy()
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        assert found.shape == expected.shape
        for row, length in enumerate(lengths):  # float32 sums in another order
            np.testing.assert_allclose(found[row, :, :length], expected[row, :, :length], atol=2e-6, rtol=0)


def test_a_program_has_one_node_for_each_layer(full_speech_bundle: Path) -> None:
    program = onnx.load(full_speech_bundle / PROGRAM)
    domain, name = OPERATOR.split("::")
    nodes = [(node.domain, node.op_type) for node in program.graph.node if node.domain]
    assert nodes == [(domain, name)] * CONFIG.num_layers
    assert {opset.domain: opset.version for opset in program.opset_import} == {"": OPSET, domain: VERSION}
    assert not program.functions


def test_after_the_export_the_module_computes_again_even_if_it_failed() -> None:
    module, inputs = Attending(), make_inputs([9, 8])
    expected = module(*inputs.values())
    with pytest.raises(RuntimeError, match="the export failed"), as_fused_nodes(module):
        raise RuntimeError("the export failed")
    assert torch.equal(module(*inputs.values()), expected)
