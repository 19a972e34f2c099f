"""Writing a bundle: programs, weights, golden vectors, model card, manifest; complete or not at all."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from export.half_precision import halve
from export.model_card import render_model_card
from export.onnx_program import OPSET, export_onnx
from export.parity import TOLERANCES, allow_share_off, join_parities, magnitude, measure_parity
from export.plan import Plan
from export.planners import make_plan
from export.source import WEIGHTS, Source
from export.torchscript_program import export_torchscript
from service.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    SEQUENCE_PARALLEL,
    Conversion,
    Golden,
    Manifest,
    Parity,
    Precision,
    hash_file,
    write_manifest,
)
from service.runtimes import RUNTIMES
from service.sample import Arrays

PROGRAM = "model.onnx"
PROGRAMS = {"onnx": PROGRAM, "torchscript": "model.pt"}  # runtime → its file; those are all that there are
GOLDEN = "golden.npz"
CARD = "MODEL_CARD.md"
# Other processors order sums differently; a wrong weight or a wrong pixel is orders of magnitude above this.
ATOL, RTOL = 1e-4, 1e-3


def write_bundle(
    source: Source,
    model: nn.Module,
    out: Path,
    *,
    runtimes: Sequence[str] = ("onnx",),
    precision: Precision = "fp32",
) -> Manifest:
    """Write the bundle of a model, trained here or converted.

    Trained weights are stored as float16, which they were rounded to before they were measured; converted ones as
    float32, as they are not changed.

    Args:
        source: facts about the weights.
        model: with the weights, in evaluation mode.
        out: the bundle's folder; replaced as a whole once the new one is complete.
        runtimes: that it gets programs for, of `PROGRAMS`.
        precision: of the programs. The golden vectors are always the module's own, in float32.
    Returns: the manifest written.
    Raises: ValueError if the task has no export, the model is of a kind that has no program for it, float16 does not
        hold trained weights, or a program is not the model's equal.
    """
    plan = make_plan(source, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        dtype = torch.float32 if isinstance(source.origin, Conversion) else torch.float16
        save_weights(model, folder / WEIGHTS, dtype=dtype)
        computing = plan if precision == "fp32" else replace(plan, program=halve(plan.program))
        parities = []
        for runtime in runtimes:
            _write_program(computing, folder, runtime)
            parities.append(_check_program(plan, folder, runtime, precision=precision))
        programs = {runtime: PROGRAMS[runtime] for runtime in runtimes}
        arrays = {f"input.{name}": array for name, array in plan.golden.items()}
        expected = plan.run(plan.golden)
        golden = _make_golden(plan, expected, precision)
        arrays |= {f"output.{name}": expected[name] for name in golden.outputs or plan.output_names}
        np.savez_compressed(folder / GOLDEN, allow_pickle=False, **arrays)
        fields = source.model_dump() | {
            "format_version": FORMAT_VERSION,
            "spec": plan.spec,
            "length_buckets": plan.length_buckets,
            "short_length": plan.short_length,
            "long_length": plan.long_length,
            "programs": programs | ({SEQUENCE_PARALLEL: WEIGHTS} if plan.long_length is not None else {}),
            "opset": OPSET if "onnx" in runtimes else None,
            "inputs": plan.inputs,
            "outputs": plan.outputs,
            "precision": precision,
            "golden": golden,
            "parity": join_parities(parities),
        }
        (folder / CARD).write_text(render_model_card(Manifest.model_validate(fields | {"files": _hashes(folder)})))
        manifest = Manifest.model_validate(fields | {"files": _hashes(folder)})
        write_manifest(folder, manifest)
        _move(folder, out)
    return manifest


def _write_program(plan: Plan, folder: Path, runtime: str) -> None:
    path = folder / PROGRAMS[runtime]
    if runtime == "torchscript":
        export_torchscript(plan, path)
    else:
        export_onnx(plan, path, weights=folder / WEIGHTS)


def _check_program(plan: Plan, folder: Path, runtime: str, *, precision: Precision) -> Parity:
    """Compare a program with the module.

    Raises: ValueError as `write_bundle`.
    """
    opened = RUNTIMES[runtime](folder / PROGRAMS[runtime], device="cpu")
    try:
        return measure_parity(plan, opened, precision=precision)
    finally:
        opened.close()


def _make_golden(plan: Plan, expected: Arrays, precision: Precision) -> Golden:
    """Tell how closely the expected outputs must be reproduced.

    In fp16 tolerances are those of parity, each output's by its own magnitude, as small shares stand beside large
    logits; and decisions, which may be others, prove nothing.
    """
    if precision == "fp32":
        return Golden(file=GOLDEN, atol=ATOL, rtol=RTOL, max_share_off=plan.max_share_off, outputs=plan.golden_outputs)
    names = [
        name for name in plan.golden_outputs or plan.output_names if np.issubdtype(expected[name].dtype, np.floating)
    ]
    tolerance = TOLERANCES[precision]
    atols = {name: tolerance * magnitude(expected[name]) for name in names}
    return Golden(
        file=GOLDEN,
        atol=min(atols.values()),
        atol_by_output=atols if len(atols) > 1 else {},
        rtol=tolerance,
        max_share_off=allow_share_off(plan, precision),
        outputs=tuple(names),
    )


def save_weights(model: nn.Module, path: Path, *, dtype: torch.dtype) -> None:
    """Write the weights, floating-point ones as `dtype`.

    Raises: ValueError naming a weight that `dtype` does not hold exactly.
    """
    weights = {}
    for name, weight in model.state_dict().items():
        stored = weight.to(dtype) if weight.is_floating_point() else weight
        if not torch.equal(stored.to(weight.dtype), weight):
            held = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} has values that {held} does not hold; round all weights before measuring them")
        weights[name] = stored.contiguous()
    path.write_bytes(save(weights))  # save_file would make a file that only its owner may read


def _move(folder: Path, out: Path) -> None:
    """Put a folder in the place of an older one, which moves to beside the folder; if that fails, it comes back."""
    old = folder.with_name(f"{out.name}.old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
