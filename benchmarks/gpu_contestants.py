"""What runs a bundle on a device: its programs, as the service opens them, and the module that they were made of.

The module runs as it is, and as what AOTInductor, torch's compiler ahead of time, makes of it: native code, which a
bundle may not hold, so it is compiled where it is measured. All that torch runs is run by one runtime, so that copies,
streams and threads are the same.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_compiled import compile_program
from export.half_precision import halve
from export.planners import make_plan
from export.source import WEIGHTS, read_source
from service.bundle import MANIFEST, Bundle, open_bundle
from service.collate import LENGTHS
from service.errors import BundleError
from service.runtimes import RUNTIMES
from service.runtimes.runtime import Runtime
from service.runtimes.torchscript import TorchScriptRuntime, prepare_cuda
from service.sample import Sample

COMPILED, EAGER = "aotinductor", "eager"
CONTESTANTS = (*RUNTIMES, COMPILED, EAGER)


def choose_bundles(roots: Sequence[Path]) -> list[Bundle]:
    """Open the bundles in several folders; of those with the same weights and precision the one with most programs.

    Args:
        roots: one that is not there holds none.
    Returns: precisions of one model beside each other.
    """
    found: dict[tuple[str, str], Bundle] = {}
    for folder in sorted(path.parent for root in roots for path in root.glob(f"*/{MANIFEST}")):
        bundle = open_bundle(folder)
        manifest = bundle.manifest
        key = manifest.files.get(WEIGHTS, bundle.sha256), manifest.precision
        if key not in found or len(found[key].manifest.programs) < len(manifest.programs):
            found[key] = bundle
    return sorted(found.values(), key=lambda bundle: (bundle.manifest.name, bundle.manifest.precision))


@contextmanager
def open_contestant(bundle: Bundle, name: str, device: str, *, cache: Path) -> Iterator[Runtime]:
    """Open a contestant until the block ends.

    Args:
        bundle: that it runs.
        name: one of `CONTESTANTS`.
        device: `cpu` or `cuda:N`.
        cache: folder for what is compiled.
    Raises: BundleError if the bundle has no such program or it cannot be used here; what torch raises if it cannot be
        compiled.
    """
    runtime = _open_program(bundle, name, device) if name in RUNTIMES else _open_module(bundle, name, device, cache)
    try:
        yield runtime
    finally:
        runtime.close()


def cut_samples(bundle: Bundle) -> list[Sample]:
    """Cut the golden inputs into samples, as a task's decoder would give them."""
    inputs, _ = bundle.read_golden()
    lengths = inputs[LENGTHS].tolist() if LENGTHS in inputs else itertools.repeat(1)
    arrays = {name: array for name, array in inputs.items() if name != LENGTHS}
    number = len(next(iter(arrays.values())))
    return [
        Sample(
            inputs={
                name: np.ascontiguousarray(array[row, :length] if LENGTHS in inputs else array[row])
                for name, array in arrays.items()
            },
            length=length,
            context=None,
        )
        for row, length in zip(range(number), lengths, strict=False)
    ]


def _open_program(bundle: Bundle, name: str, device: str) -> Runtime:
    programs = bundle.manifest.programs
    if name not in programs:
        raise BundleError(f"{bundle.folder} has no program for {name}; `make programs` makes one")
    return RUNTIMES[name](bundle.folder / programs[name], device=device, native_library=None)


def _open_module(bundle: Bundle, name: str, device: str, cache: Path) -> Runtime:
    target = torch.device(device)
    if target.type == "cuda":
        prepare_cuda(target)
    plan = make_plan(*read_source(bundle.folder))
    program = plan.program if bundle.manifest.precision == "fp32" else halve(plan.program)
    plan = replace(plan, program=program.to(target))
    return TorchScriptRuntime(
        compile_program(plan, target, cache) if name == COMPILED else plan.program,
        inputs=[tensor.name for tensor in plan.inputs],
        outputs=plan.output_names,
        device=target,
        name=name,
    )
