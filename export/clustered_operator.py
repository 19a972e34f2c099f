"""Clustered attention as one ONNX operator of our own domain, with a body that any ONNX Runtime can run.

A program holds one node for each clustered attention and, once, the function that says what such a node computes in
standard operators. Stock ONNX Runtime runs the function. A session that has the native kernel of the same name
(`export/native`) runs that instead.

Deliberately absent: causal attention and several bodies in one program, as no exported model has either.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.export import Dim

from models.clustered_attention import ClusteredAttention, attend, attend_short
from service.runtimes.onnx import OPERATORS

DOMAIN, NAME, VERSION = "clustered_attention", "ClusteredAttention", 1
INPUTS = ("q", "k", "v", "planes", "query_lengths", "key_lengths")
OUTPUTS = ("out", "clusters")

Settings = dict[str, Any]  # keyword arguments of `attend`, which are the node's attributes


class OperatorBody(nn.Module):
    """`attend` with its settings, to be exported as the operator's body.

    Args:
        settings: keyword arguments of `attend`.
        are_all_short: the body for a batch in which every sample gets full attention.
    """

    def __init__(self, settings: Settings, *, are_all_short: bool = False) -> None:
        super().__init__()
        self._settings, self._are_all_short = settings, are_all_short

    def forward(  # noqa: PLR0917 - the operator's inputs
        self, q: Tensor, k: Tensor, v: Tensor, planes: Tensor, query_lengths: Tensor, key_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `attend`."""
        if not self._are_all_short:
            return attend(q, k, v, planes, query_lengths, key_lengths, **self._settings)
        settings = {name: self._settings[name] for name in ("num_clusters", "scale", "full_below")}
        return attend_short(q, k, v, query_lengths, key_lengths, **settings)


@contextmanager
def as_operators(model: nn.Module) -> Iterator[Settings | None]:
    """Let every clustered attention of a model export as one node.

    In the `with` block the model computes nothing by itself: it is for the exporter alone.

    Gives: the settings that all of them share; None if there are none.
    Raises: ValueError if their settings differ, as one function cannot be the body of both, or one is causal.
    """
    attentions = [module for module in model.modules() if isinstance(module, ClusteredAttention)]
    settings: Settings | None = None
    for attention in attentions:
        of_this = _settings_of(attention)
        if settings not in (None, of_this):
            raise ValueError(
                f"clustered attentions differ in their settings, {settings} and {of_this}; a program has one body for "
                "all of them; use the same settings in all layers"
            )
        settings = of_this
    with replaced_operators(model, _emit):
        yield settings


@contextmanager
def replaced_operators(model: nn.Module, operator: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let every clustered attention of a model call something else until the block ends.

    Args:
        model: that holds them.
        operator: with the call of `attend`.
    """
    attentions = [module for module in model.modules() if isinstance(module, ClusteredAttention)]
    computing = [attention.operator for attention in attentions]
    try:
        for attention in attentions:
            attention.operator = operator
        yield
    finally:
        for attention, former in zip(attentions, computing, strict=True):
            attention.operator = former


def make_body(settings: Settings, *, opset: int) -> onnx.FunctionProto:
    """Export `attend` as a model-local function, for inputs of all shapes.

    Where short samples get full attention, the function has two branches: a batch of short samples alone is not
    clustered.

    Args:
        settings: of all nodes that call it; they are constants of the body.
        opset: of the standard operators.
    """
    model = _export_body(OperatorBody(settings), opset=opset)
    if settings["full_below"]:
        short = _export_body(OperatorBody(settings, are_all_short=True), opset=opset)
        nodes = _choose(settings["full_below"], _make_branch(short, "short"), _make_branch(model, "mixed"))
    else:
        nodes = _list_nodes(model.graph)
    return helper.make_function(
        DOMAIN,
        NAME,
        list(INPUTS),
        list(OUTPUTS),
        nodes,
        model.opset_import,
        attributes=sorted(settings),
    )


def _export_body(body: OperatorBody, *, opset: int) -> onnx.ModelProto:
    B, H, N, S, E, D, P = 2, 3, 50, 40, 16, 24, 8  # all different, so that none is taken for another
    example = (
        *(torch.zeros(B, H, *shape) for shape in ((N, E), (S, E), (S, D))),
        torch.zeros(P, E + 1),
        *(torch.full((B,), length) for length in (N, S)),
    )
    batch, heads, queries, keys, head_dim, value_dim, planes = (
        Dim(name) for name in ("batch", "heads", "queries", "keys", "head_dim", "value_dim", "planes")
    )
    exported = torch.onnx.export(
        body.eval(),
        example,
        dynamo=True,
        opset_version=opset,
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        dynamic_shapes=(
            {0: batch, 1: heads, 2: queries, 3: head_dim},
            {0: batch, 1: heads, 2: keys, 3: head_dim},
            {0: batch, 1: heads, 2: keys, 3: value_dim},
            {0: planes, 1: head_dim + 1},
            {0: batch},
            {0: batch},
        ),
        verbose=False,
    )
    assert exported is not None, "dynamo=True returns the program"
    model = exported.model_proto
    for part in (*model.graph.node, *model.graph.initializer):
        part.ClearField("metadata_props")  # stack traces of the machine that exported
        part.ClearField("doc_string")
    return model


def _list_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """A graph's nodes, its initial values among them, which a function cannot have."""
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in graph.initializer]
    return [*constants, *graph.node]


def _make_branch(model: onnx.ModelProto, prefix: str) -> onnx.GraphProto:
    """Make a graph that takes the operator's inputs from around it, and whose other names none there has."""
    nodes = _list_nodes(model.graph)
    for node in nodes:
        if any(
            attribute.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS} for attribute in node.attribute
        ):
            raise ValueError(f"{node.op_type} has a graph of its own, whose names are not made unique")
        node.name = f"{prefix}/{node.name}"
        for names in (node.input, node.output):
            names[:] = [name if not name or name in INPUTS else f"{prefix}/{name}" for name in names]
    outputs = [
        helper.make_tensor_value_info(f"{prefix}/{name}", kind, None)
        for name, kind in zip(OUTPUTS, (onnx.TensorProto.FLOAT, onnx.TensorProto.INT32), strict=True)
    ]
    return helper.make_graph(nodes, prefix, [], outputs)


def _choose(full_below: int, short: onnx.GraphProto, mixed: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Take one branch where every sample has fewer queries and keys than `full_below`, else the other."""
    limit = helper.make_tensor("", onnx.TensorProto.INT64, [], [full_below])
    return [
        helper.make_node("Constant", [], ["limit"], value=limit),
        helper.make_node("Max", ["query_lengths", "key_lengths"], ["longer"]),
        helper.make_node("ReduceMax", ["longer"], ["longest"], keepdims=0),
        helper.make_node("Less", ["longest", "limit"], ["are_all_short"]),
        helper.make_node("If", ["are_all_short"], list(OUTPUTS), then_branch=short, else_branch=mixed),
    ]


def add_body(model: onnx.ModelProto, body: onnx.FunctionProto) -> None:
    """Give a program the body of its nodes."""
    model.functions.append(body)
    if DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    model.metadata_props.add(key=OPERATORS, value=f"{DOMAIN}.{NAME}")  # tells a runtime that kernels may exist


def _settings_of(attention: ClusteredAttention) -> Settings:
    """Settings of a clustered attention as `attend` takes them.

    Raises: ValueError if it is causal.
    """
    config = attention.config
    if config.is_causal:
        raise ValueError("a causal clustered attention came; the operator has no causal kind; export another model")
    return {
        "num_clusters": config.num_clusters,
        "num_iterations": config.iterations,
        "top_k": config.top_k,
        "scale": config.scale or (attention.planes.shape[1] - 1) ** -0.5,
        "metric": config.metric,
        "full_below": config.full_below,
    }


def _emit(  # noqa: PLR0917 - the operator's inputs
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    dropout: float,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Put a node into the graph that is being exported, with the call of `attend`."""
    assert dropout == 0.0, "a model is exported in evaluation mode"
    out, clusters = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{NAME}",
        (q, k, v, planes, query_lengths, key_lengths),
        settings,
        dtypes=(v.dtype, torch.int32),
        shapes=((*q.shape[:3], v.shape[3]), q.shape[:3]),
        version=VERSION,
    )
    return out, clusters
