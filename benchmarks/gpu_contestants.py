"""What runs a bundle on a device: its programs, as the service opens them, and the module that they were made of."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from export.plan import Plan
from export.planners import make_plan
from export.source import read_source
from service.bundle import MANIFEST, Bundle
from service.collate import LENGTHS
from service.errors import BundleError
from service.runtimes import RUNTIMES
from service.runtimes.runtime import Runtime
from service.sample import Arrays, Sample

EAGER = "eager"


class EagerRuntime:
    """A module of torch on a device; see `Runtime`.

    Args:
        plan: of the model.
        device: `cpu` or `cuda:N`.
    """

    name, kernel, num_streams = EAGER, "portable", 2
    version: str = torch.__version__

    def __init__(self, plan: Plan, device: str) -> None:
        self.device = device
        self._plan, self._program = plan, plan.program.to(device)

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; see `Runtime.run`."""
        # Writable copies: torch warns of others.
        given = (torch.from_numpy(np.array(inputs[tensor.name])).to(self.device) for tensor in self._plan.inputs)
        with torch.inference_mode():
            found = dict(zip(self._plan.output_names, self._program(*given), strict=True))
        return {name: found[name].cpu().numpy() for name in outputs}

    def close(self) -> None:
        """Nothing is held beyond the module."""


def find_folders(roots: Sequence[Path]) -> list[Path]:
    """Find the bundles in several folders; a folder that is not there holds none."""
    return sorted(path.parent for root in roots for path in root.glob(f"*/{MANIFEST}"))


def list_contestants(bundle: Bundle) -> list[str]:
    """Name what can run a bundle."""
    return [*(name for name in RUNTIMES if name in bundle.manifest.programs), EAGER]


@contextmanager
def open_contestant(bundle: Bundle, name: str, device: str) -> Iterator[Runtime | None]:
    """Open a contestant until the block ends; None, and a line that says why, if it cannot be used here."""
    try:
        runtime: Runtime = (
            EagerRuntime(make_plan(*read_source(bundle.folder)), device)
            if name == EAGER
            else RUNTIMES[name](bundle.folder / bundle.manifest.programs[name], device=device, native_library=None)
        )
    except BundleError as error:
        print(f"{bundle.manifest.name}, {name}: not measured: {error}", flush=True)
        yield None
        return
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
