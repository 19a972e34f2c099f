"""A plan's module compiled by AOTInductor, torch's compiler ahead of time, for any size of the dimensions that vary.

Differs: clustered attention is not compiled but called, as one operator of a library of ours: it chooses by the data
whether to cluster, and its rounds, unrolled in every layer, took the compiler longer than anything else here takes.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package
from torch._inductor.package.package import load_package
from torch.export import Dim, ExportedProgram

from benchmarks.machine import processor
from export.clustered_operator import replaced_operators
from export.plan import Plan
from models.clustered_attention import attend
from models.clustering import Metric
from service.runtimes.warmup import MAX_STREAMS

OPERATOR = "benchmarks::attend"
COMPILER = {
    "always_keep_tensor_constants": True,  # one without dimensions becomes a number else, which torch 2.13 cannot shape
    "cpp.threads": 1,  # on the CPU it is written into the program; the other contestants have one thread, too
}


def compile_program(plan: Plan, device: torch.device, folder: Path) -> Any:
    """Compile a plan's module, or load what was compiled of the same graph and weights before.

    Args:
        plan: its program is on the device, in evaluation mode.
        device: that it is compiled for.
        folder: where compiled programs are kept, as compiling takes a while.
    Returns: what takes the inputs in their order and gives a tuple of the outputs; several threads may call it.
    Raises: what torch raises if it cannot compile the module.
    """
    example = tuple(torch.from_numpy(plan.example[tensor.name]).to(device) for tensor in plan.inputs)
    varying = tuple(
        {axis: Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in plan.inputs
    )
    with torch.no_grad(), replaced_operators(plan.program, _call):
        exported = torch.export.export(plan.program, example, dynamic_shapes=varying)
    package = folder / f"compiled-{_fingerprint(exported, device)}.pt2"
    if not package.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = package.with_name(f"unfinished-{package.name}")
        aoti_compile_and_package(exported, package_path=str(unfinished), inductor_configs=dict(COMPILER))
        unfinished.rename(package)
    # A runner is what one call uses at a time: as many as there are batches in flight.
    device_index = device.index if device.type == "cuda" else -1
    return load_package(str(package), num_runners=MAX_STREAMS, device_index=device_index)


def _call(  # noqa: PLR0917 - the operator's inputs
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
    assert dropout == 0.0, "a model is compiled in evaluation mode"
    found: tuple[Tensor, Tensor] = _register()(q, k, v, planes, query_lengths, key_lengths, **settings)
    return found


@cache
def _register() -> Any:
    """Tell torch of the operator, once in a process."""
    operator = torch.library.custom_op(OPERATOR, _attend, mutates_args=())
    operator.register_fake(_allocate)
    return operator


def _attend(  # noqa: PLR0917 - the operator's inputs
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    num_clusters: int,
    num_iterations: int,
    top_k: int,
    scale: float,
    metric: str,
    full_below: int,
) -> tuple[Tensor, Tensor]:
    kind: Metric = "lsh" if metric == "lsh" else "l2"
    out, clusters = attend(
        q,
        k,
        v,
        planes,
        query_lengths,
        key_lengths,
        num_clusters=num_clusters,
        num_iterations=num_iterations,
        top_k=top_k,
        scale=scale,
        metric=kind,
        full_below=full_below,
    )
    return out.contiguous(), clusters.contiguous()  # what is compiled reads them as `_allocate` lays them out


def _allocate(  # noqa: PLR0917 - the operator's inputs
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    planes: Tensor,  # noqa: ARG001
    query_lengths: Tensor,  # noqa: ARG001
    key_lengths: Tensor,  # noqa: ARG001
    **settings: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return v.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.int32)


def _fingerprint(exported: ExportedProgram, device: torch.device) -> str:
    computer = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    digest = hashlib.sha256(repr((exported.graph_module.code, computer, torch.__version__, COMPILER)).encode())
    for name, value in [*exported.state_dict.items(), *exported.constants.items()]:
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
