"""Plans → ONNX programs that stock ONNX Runtime runs, at any size of the dimensions that vary."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import Dim

from export.clustered_operator import add_body, as_operators, make_body
from export.full_attention import as_fused_nodes
from export.plan import Plan
from export.shared_weights import share_weights
from service.bundle import TensorSpec

OPSET = 20  # the first with Gelu as one operator
MIN_HALVED = 256  # elements; a Cast for less is not worth a node


def export_onnx(plan: Plan, path: Path, *, weights: Path | None = None) -> None:
    """Export a plan's program; each attention on lengths becomes one node, and the body of clustered ones comes along.

    Weights that float16 holds exactly are stored so, with a Cast that the runtime folds when it loads: half the file,
    the same numbers.

    Args:
        plan: its program is in evaluation mode.
        path: of the file to write.
        weights: safetensors in the same folder, which the program then shares; None puts all weights into the program.
    Raises: ValueError as `as_operators`.
    """
    with as_operators(plan.program) as settings, as_fused_nodes(plan.program):
        exported = torch.onnx.export(
            plan.program,
            tuple(torch.from_numpy(plan.example[tensor.name]) for tensor in plan.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in plan.inputs],
            output_names=list(plan.output_names),
            dynamic_shapes=_name_dimensions(plan.inputs),
            verbose=False,
        )
    assert exported is not None, "dynamo=True returns the program"
    model = exported.model_proto
    _halve(model)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")  # stack traces of the machine that exported
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    if settings is not None:
        add_body(model, make_body(settings, opset=OPSET))
    if weights is not None:
        share_weights(model, weights)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path, full_check=True)


def _name_dimensions(inputs: Sequence[TensorSpec]) -> tuple[dict[int, Dim], ...]:
    """Tell the exporter which dimensions vary, and by their names which of them are equal."""
    names = {size for tensor in inputs for size in tensor.shape if isinstance(size, str)}
    dims = {name: Dim(name) for name in names}
    return tuple(
        {axis: dims[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in inputs
    )


def _halve(model: onnx.ModelProto) -> None:
    graph = model.graph
    casts = []
    for initializer in graph.initializer:
        if initializer.data_type != TensorProto.FLOAT:
            continue
        full = numpy_helper.to_array(initializer)
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        if full.size < MIN_HALVED or not np.array_equal(half.astype(np.float32), full):
            continue
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.node.insert(0, cast)
