"""Plans → TorchScript programs: archives that torch runs without our code, at any size of the dimensions that vary.

A program starts as what `torch.export` makes of the module, operators of torch alone, and is compiled from there: what
`torch.jit.trace` writes would keep sizes and branches of its example. Clustered attention is a module of its own in it,
one for all layers, with the two branches that the ONNX body has.

Differs: devices are not part of the program; tensors that it makes go where its inputs are. Every Python stack that
torch writes along is left out, as it tells paths of the machine that exported.
"""

import io
import json
import operator
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import Dim
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate

from export.clustered_operator import OperatorBody, Settings, as_operators
from export.plan import Plan
from service.runtimes.torchscript import TENSORS

OPERATOR = "onnx_symbolic::_symbolic_multi_out"  # what `as_operators` puts in the place of a clustered attention
BODY = "clustered_attention"  # the submodule that all layers call
DEBUG = ".debug_pkl"  # what the archive's members end with that tell where code came from
# Checks for the compiler, and copies that change nothing outside training.
CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
NUMBERS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)  # noqa: SLF001 - no other name
# What Python numbers go through while sizes are symbols → what TorchScript has for its own.
OF_SIZES: dict[Callable[..., Any], Callable[..., Any]] = {torch.sym_min: min, torch.sym_max: max}


class Branches(nn.Module):
    """Clustered attention of a batch: in full where every sample is short, else the way for all lengths.

    Args:
        short, mixed: the two ways, with the inputs of the operator.
        full_below: samples with fewer queries and keys are short.
    """

    def __init__(self, short: nn.Module, mixed: nn.Module, *, full_below: int) -> None:
        super().__init__()
        self.short, self.mixed, self.full_below = short, mixed, full_below

    def forward(  # noqa: PLR0917 - the operator's inputs
        self, q: Tensor, k: Tensor, v: Tensor, planes: Tensor, query_lengths: Tensor, key_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `models.clustered_attention.attend`."""
        if int(torch.maximum(query_lengths, key_lengths).max()) < self.full_below:
            return self.short(q, k, v, planes, query_lengths, key_lengths)
        return self.mixed(q, k, v, planes, query_lengths, key_lengths)


def export_torchscript(plan: Plan, path: Path) -> None:
    """Export a plan's program.

    Args:
        plan: its program is in evaluation mode.
        path: of the file to write.
    Raises: ValueError as `as_operators`, or if the program holds something that TorchScript has no word for.
    """
    example = tuple(torch.from_numpy(plan.example[tensor.name]) for tensor in plan.inputs)
    varying = tuple(
        {axis: Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in plan.inputs
    )
    with as_operators(plan.program) as settings:
        graph_module = _export(plan.program, example, varying)
    body = None if settings is None else _make_body(settings)
    program = _compile(graph_module, body)
    names = {"inputs": [tensor.name for tensor in plan.inputs], "outputs": list(plan.output_names)}
    content = io.BytesIO()
    torch.jit.save(program, content, _extra_files={TENSORS: json.dumps(names)})
    path.write_bytes(_strip(content))


def _make_body(settings: Settings) -> nn.Module:
    mixed = _compile(_export_body(OperatorBody(settings)))
    if not settings["full_below"]:
        return mixed
    short = _compile(_export_body(OperatorBody(settings, are_all_short=True)))
    return Branches(short, mixed, full_below=settings["full_below"])


def _export_body(body: OperatorBody) -> fx.GraphModule:
    B, H, N, S, E, D, P = 2, 3, 50, 40, 16, 24, 8  # all different, so that none is taken for another
    example = (
        *(torch.zeros(B, H, *shape) for shape in ((N, E), (S, E), (S, D))),
        torch.zeros(P, E + 1),
        *(torch.full((B,), length) for length in (N, S)),
    )
    varying = tuple(dict.fromkeys(range(tensor.ndim), Dim.DYNAMIC) for tensor in example)
    return _export(body.eval(), example, varying)


def _export(module: nn.Module, example: tuple[Tensor, ...], varying: tuple[dict[int, Any], ...]) -> fx.GraphModule:
    with torch.no_grad():
        exported = torch.export.export(module, example, dynamic_shapes=varying)
    graph_module = exported.module(check_guards=False)
    _inline(graph_module)
    if all(_is_plain(node) for node in graph_module.graph.nodes):
        return graph_module
    # Takes longer than the export. Without a table nothing is taken apart; what is written into a tensor becomes a
    # tensor of its own.
    return exported.run_decompositions({}).module(check_guards=False)


def _inline(graph_module: fx.GraphModule) -> None:
    """Put what stands where autocast is off, as it is wherever a program runs, among the rest."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast):
        _, _, is_enabled, _, part, *arguments = node.args
        if is_enabled:
            continue
        inner = getattr(graph_module, part.target).graph
        given = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
        with graph.inserting_before(node):
            results = cast("tuple[fx.Node, ...]", graph.graph_copy(inner, given))
        for user in list(node.users):  # each takes one of the results
            user.replace_all_uses_with(results[cast("int", user.args[1])])
            graph.erase_node(user)
        graph.erase_node(node)


def _is_plain(node: fx.Node) -> bool:
    """Whether a node calls a function of numbers, or an operator that writes into none of its inputs."""
    target = node.target
    if isinstance(target, OpOverload):
        return not target._schema.is_mutable  # noqa: SLF001 - the only place that tells
    return not isinstance(target, HigherOrderOperator)


def _compile(graph_module: fx.GraphModule, body: nn.Module | None = None) -> torch.jit.ScriptModule:
    """Write an exported graph in TorchScript.

    Args:
        graph_module: of `torch.export`; it is changed.
        body: what stands in for the operators of clustered attention.
    """
    graph = graph_module.graph
    if body is not None:
        graph_module.add_submodule(BODY, body)
    first = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(next(reversed(graph.find_nodes(op="placeholder")))):
        device = graph.call_function(getattr, (first, "device"))
    for node in list(graph.nodes):
        node.type = None
        if node.op == "call_function" and node is not device:
            _rewrite(graph, node, device)
    graph.eliminate_dead_code()
    graph.set_codegen(CodeGen())  # plain arguments and a plain tuple
    graph.lint()
    return torch.jit.script(fx.GraphModule(graph_module, graph).eval())


def _rewrite(graph: fx.Graph, node: fx.Node, device: fx.Node) -> None:
    """Replace what only Python understands."""
    target = node.target
    if isinstance(target, OpOverload) and target.name() == OPERATOR:
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(BODY, tuple(cast("list[fx.Node]", node.args[0]))))
        graph.erase_node(node)
    elif target is torch.ops.aten.sym_size.int:
        node.target = torch.ops.aten.size
    elif target is torch.ops.aten.view.default:
        node.target = torch.ops.aten.reshape  # the exporter saw how tensors lay here; on a GPU they may lie otherwise
    elif target in NUMBERS and isinstance(node.meta["val"], torch.SymInt):
        node.target = int  # TorchScript's own would be a number that may have a fraction, and no size
    elif target is torch.ops.aten.topk.default and (len(node.args) < 5 or node.args[4]):
        _sort(graph, node)
    elif target in OF_SIZES:
        node.target = OF_SIZES[target]
    elif isinstance(target, OpOverload):
        if target.overloadpacket.__name__ in CHECKS:
            graph.erase_node(node)
            return
        node.target = target.overloadpacket
        node.args, node.kwargs = (_place(part, device) for part in (node.args, node.kwargs))
    elif getattr(operator, getattr(target, "__name__", ""), None) is not target:
        raise ValueError(f"{node.format_node()} has no word in TorchScript")


def _sort(graph: fx.Graph, topk: fx.Node) -> None:
    """Let the lower of two equal numbers' indices win, as with ONNX; what asks for no order leaves it open."""
    x, count, *rest = topk.args
    dim = rest[0] if rest else -1
    with graph.inserting_before(topk):
        ordered = graph.call_function(
            torch.ops.aten.sort, (x,), {"stable": True, "dim": dim, "descending": rest[1] if len(rest) > 1 else True}
        )
        for user in list(topk.users):  # values and indices
            part = graph.call_function(operator.getitem, (ordered, user.args[1]))
            user.replace_all_uses_with(graph.call_function(torch.ops.aten.slice, (part, dim, 0, count)))
            graph.erase_node(user)
    graph.erase_node(topk)


def _place(part: Any, device: fx.Node) -> Any:
    return map_aggregate(part, lambda value: device if isinstance(value, torch.device) else value)


def _strip(archive: io.BytesIO) -> bytes:
    """Leave the debugging information out of an archive."""
    stripped = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(stripped, "w", zipfile.ZIP_STORED) as new:
        for member in _keep(old.infolist()):
            new.writestr(zipfile.ZipInfo(member.filename), old.read(member))
    return stripped.getvalue()


def _keep(members: Iterable[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    return [member for member in members if not member.filename.endswith(DEBUG)]
