"""TorchScript: a program that torch's own interpreter runs, on the CPU or on CUDA; the only module that knows torch.

A call uses one thread on the CPU, as in `service.runtimes.onnx`. The interpreter's optimiser is off: it watches the
first calls and compiles for the shapes that it saw, so that requests of new lengths would wait for it.

Deliberately absent: torch's Python modules of models. A program brings all of its code along, and a program is opened
only after its bundle's checksums held.
"""

import json
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from service.errors import BundleError
from service.runtimes.onnx import CUDA_STREAMS
from service.sample import Arrays
from service.settings import count_cores

if TYPE_CHECKING:
    import torch

TENSORS = "tensors.json"  # in the archive: names of the inputs and outputs, in the order in which the program has them


class TorchScriptRuntime:
    """A program of torch; see `Runtime`.

    Args:
        program: a `torch.jit.ScriptModule` on the device, or what else takes tensors and gives a tuple of them.
        inputs, outputs: names, in order.
        device: that it is on.
        name: of what runs it; benchmarks give modules and compiled programs here, to treat all alike.
    """

    kernel = "portable"

    def __init__(
        self,
        program: Any,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: "torch.device",
        name: str = "torchscript",
    ) -> None:
        import torch

        self.name = name
        self._torch = torch
        self._program = program
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._device = device
        self._of_thread = threading.local()
        self.version: str = torch.__version__
        self.device = str(device)
        self.num_streams = CUDA_STREAMS if device.type == "cuda" else count_cores()

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; see `Runtime.run`."""
        torch = self._torch
        with torch.inference_mode(), torch.jit.optimized_execution(False), self._prepare_thread():
            # A copy: a batch is not to be written to, which torch would warn of.
            tensors = [torch.tensor(np.ascontiguousarray(inputs[name]), device=self._device) for name in self._inputs]
            found = dict(zip(self._outputs, self._program(*tensors), strict=True))
            return {name: found[name].cpu().numpy() for name in outputs}

    def close(self) -> None:
        """Let go of the program."""
        self._program = None

    def _prepare_thread(self) -> AbstractContextManager[Any]:
        """Give the calling thread a CUDA stream of its own, or one CPU thread: torch keeps both for each thread."""
        if self._device.type == "cuda":
            if not hasattr(self._of_thread, "stream"):
                self._of_thread.stream = self._torch.cuda.Stream(self._device)
            return self._torch.cuda.stream(self._of_thread.stream)
        if not hasattr(self._of_thread, "is_single"):
            self._torch.set_num_threads(1)
            self._of_thread.is_single = True
        return nullcontext()


def open_torchscript(
    path: Path,
    *,
    device: str,
    native_library: Path | None = None,  # noqa: ARG001 - called as `open_onnx` is
) -> TorchScriptRuntime:
    """Load a program.

    Args:
        path: of the archive.
        device: `cpu` or `cuda:N`.
        native_library: not looked at; its kernels are ONNX Runtime's.
    Raises: BundleError if torch is missing, the program does not load, or torch does not find the GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise BundleError(
            f"{path} needs torch, which is not installed; install it (`make setup`), or serve a "
            "bundle with an ONNX program under SERVICE_RUNTIME=auto"
        ) from error
    target = torch.device(device)
    if target.type == "cuda":
        prepare_cuda(target)
    extra = {TENSORS: ""}
    try:
        program = torch.jit.load(str(path), map_location=target, _extra_files=extra)
        tensors = json.loads(extra[TENSORS])
        inputs, outputs = tensors["inputs"], tensors["outputs"]
        program = torch.jit.freeze(program.eval())
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} does not load in torch {torch.__version__}: {error}") from error
    if target.type == "cuda":
        torch.cuda.synchronize(target)  # the weights are there before another stream reads them
    return TorchScriptRuntime(program, inputs=inputs, outputs=outputs, device=target)


def prepare_cuda(device: "torch.device") -> None:
    """Let torch compute on a GPU as programs need it: without TF32, in this whole process.

    Raises: BundleError if torch does not find that GPU.
    """
    import torch

    if device.index >= torch.cuda.device_count():
        fault = (
            f"torch {torch.__version__} is built without CUDA; install a build with it"
            if torch.version.cuda is None
            else f"torch {torch.__version__} finds {torch.cuda.device_count()} GPUs; name one of them or load the "
            f"driver that CUDA {torch.version.cuda} needs"
        )
        raise BundleError(f"SERVICE_DEVICE asks for {device}, but {fault}, or set SERVICE_DEVICE=cpu")
    # Rounding to TF32 flips bits of hashes, and with them clusters. Nothing else in this process uses torch.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
