"""Programs in mixed precision, for GPUs: float16 where the work is, float32 where a small error would decide something.

The rule, applied to the module before either exporter sees it, so that both formats get the same program:

- layers with weights (linear, convolutional) and products in attention take and give float16, and what stands between
  two of them stays in float16, as a widened copy would only be rounded again;
- residual sums, norms, the first convolution, which sees raw inputs, and the last layer, whose outputs are logits, are
  float32, and so are all outputs;
- decisions are float32 with float32 inputs: the whole of clustered attention where it is clustered, density peaks,
  communities and the attention whose scores they are learned from, and every other product of two float32 tensors,
  the limit of a spectrum among them.

Source: Micikevicius et al. 2018, "Mixed Precision Training"; `torch.amp` for which operations take what.
Differs: from `torch.amp`, a softmax stays in the type of its scores, because between two products in float16 a wider
one would be rounded again; runtimes compute it in float32 inside.
Deliberately absent: bfloat16, which is eight times as coarse and changes that many more clusters; float16 inputs and
outputs, so that a program is fed as every other.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from models.clustered_attention import ClusteredAttention
from models.communities import CentreCommunities, LearnedCommunities
from models.ctc_transformer import CtcTransformerLayer
from models.encoder import EncoderLayer
from models.paca_blocks import PaCaAttention, PaCaBlock
from models.semantic_fpn import ConvNormRelu
from models.tcformer_v2 import ClusterBlock
from models.thc import ScoredAttention
from models.token_blocks import TokenAttention, TokenBlock, TokenMlp

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, TokenMlp)  # their own weights become float16
PRODUCTS = (PaCaAttention, TokenAttention)  # they multiply what they are given before a layer sees it
BLOCKS = (PaCaBlock, TokenBlock, ClusterBlock, EncoderLayer, CtcTransformerLayer)  # they add to what they are given
NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
DECISIONS = (ClusteredAttention, ScoredAttention, CentreCommunities, LearnedCommunities)
LAST_LAYERS = ("head", "classifier", "score")  # names; a score decides how much a token weighs in its cluster
MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__)


def halve(program: nn.Module) -> nn.Module:
    """Copy a program into mixed precision.

    Args:
        program: in evaluation mode; takes tensors, gives a tuple of them.
    Returns: a module with the same call, whose floating-point outputs are float32.
    """
    program = deepcopy(program)
    for module in program.modules():
        if isinstance(module, ConvNormRelu):  # runtimes fold a norm into its convolution, but not across a cast
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.register_module("norm", nn.Identity())
    convolutions = (module for module in program.modules() if isinstance(module, nn.Conv1d | nn.Conv2d))
    first = next(convolutions, None)
    for name, module in program.named_modules():
        is_kept = module is first or name.rpartition(".")[2] in LAST_LAYERS
        if isinstance(module, LAYERS) and not is_kept:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.half()
        if isinstance(module, (*LAYERS, *PRODUCTS)) and not is_kept:
            module.register_forward_pre_hook(_take(torch.float16))
        elif is_kept or isinstance(module, (*BLOCKS, *NORMS, *DECISIONS)):
            module.register_forward_pre_hook(_take(torch.float32))
    compute = program.forward

    @wraps(compute)  # exporters read the signature
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        with _MixedProducts():
            return _cast(compute(*inputs), torch.float32)

    program.forward = forward
    return program


class _MixedProducts(TorchFunctionMode):
    """Takes the product of a float16 and a float32 matrix in float16; torch by itself refuses it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        if func in MATMULS and torch.float16 in {tensor.dtype for tensor in args}:
            args = _cast(args, torch.float16)
        return func(*args, **(kwargs or {}))


def _take(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Make a hook that casts what a module is called with."""
    return lambda _, inputs: _cast(inputs, dtype)


def _cast(values: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Cast the floating-point tensors among some values; whole numbers and structures stay as they are."""
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in values
    )
