"""Modules → ONNX programs that stock ONNX Runtime runs, at any batch size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 20  # the first with Gelu as one operator
EXPORT_BATCH = 2
MIN_HALVED = 256  # elements; a Cast for less is not worth a node


def export_onnx(
    program: nn.Module, example: Tensor, path: Path, *, input_name: str, output_names: Sequence[str]
) -> None:
    """Export a module with one input and a dynamic batch.

    Weights that float16 holds exactly are stored so, with a Cast that the runtime folds when it loads: half the file,
    the same numbers.

    Args:
        program: in evaluation mode.
        example: (1, …) input.
        path: of the file to write.
        input_name: of the program.
        output_names: of the program, in the module's order.
    """
    batch = example.expand(EXPORT_BATCH, *example.shape[1:])
    exported = torch.onnx.export(
        program,
        (batch,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[input_name],
        output_names=list(output_names),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
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
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


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
