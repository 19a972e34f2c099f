"""ONNX Runtime: one session, as many threads as streams call it, one thread inside each call on the CPU.

A request then costs one core, and cores are kept busy by batches beside each other. Threads inside a call do not spin:
spinning steals the cores that decode the next inputs.

On a GPU each run has buffers of its own there (`service.runtimes.onnx_binding`). What was asked for is what is used: by
itself ONNX Runtime would fall back to the CPU and say nothing.

A program may hold operators of our own, each with a body in standard operators. On the CPU a library of native kernels
replaces the bodies, if there is one.
"""

import logging
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from service.errors import BundleError
from service.runtimes.cuda import find_missing_library
from service.runtimes.onnx_binding import BoundRuns
from service.sample import Arrays
from service.settings import count_cores

logger = logging.getLogger(__name__)

OPERATORS = "operators"  # key of a program's metadata: operators of our own in it, for which native kernels may exist
CUDA_STREAMS = 2  # one batch computes while the other is copied; warm-up measures whether another number is better
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# Explained at https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
CUDA_OPTIONS = {
    "use_tf32": "0",  # TF32 flips signs of hash projections, and so assignments to clusters
    "arena_extend_strategy": "kSameAsRequested",  # several models share a GPU: none doubles what it holds
    "cudnn_conv_algo_search": "HEURISTIC",  # the default tries all algorithms at each new shape of a batch
}


class OnnxRuntime:
    """A program in an ONNX Runtime session; see `Runtime`.

    Args:
        session: an `onnxruntime.InferenceSession`.
        version: of ONNX Runtime.
        device: `cpu` or `cuda:N`.
        kernel: `portable` or `native`.
        bound: runs the session on a GPU; None on the CPU.
    """

    name = "onnx"

    def __init__(
        self, session: Any, *, version: str, device: str, kernel: str = "portable", bound: BoundRuns | None = None
    ) -> None:
        self._session, self._bound = session, bound
        self.version = version
        self.device = device
        self.kernel = kernel
        self.num_streams = count_cores() if device == "cpu" else CUDA_STREAMS

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; see `Runtime.run`."""
        if self._bound is not None:
            return self._bound.run(inputs, outputs)
        names = list(outputs)
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        """Let go of the session."""
        self._session = self._bound = None


def open_onnx(path: Path, *, device: str, native_library: Path | None = None) -> OnnxRuntime:
    """Load a program.

    Args:
        path: of the ONNX file.
        device: `cpu` or `cuda:N`.
        native_library: of kernels for our own operators, for the CPU alone; without it, or if it does not load, the
            program's own bodies run.
    Raises: BundleError if the program does not load, if a GPU was asked for and is not used, or if two builds of
        ONNX Runtime are installed over each other.
    """
    _check_installation()
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors; provider fall-back is checked below and reported once
    is_cuda = device != "cpu"
    device_id = _prepare_cuda(onnxruntime, device) if is_cuda else 0
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # With CUDA, a kernel for the CPU would force copies; the bodies run on the GPU.
    has_kernels = native_library is not None and not is_cuda and _register(options, native_library)
    providers = [(CUDA, CUDA_OPTIONS | {"device_id": str(device_id)}), CPU] if is_cuda else [CPU]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # the library's own exception classes are not public
        raise BundleError(f"{path} does not load in ONNX Runtime {onnxruntime.__version__}: {error}") from error
    if is_cuda and CUDA not in session.get_providers():
        raise BundleError(_tell_fallback(onnxruntime, device))
    operators = session.get_modelmeta().custom_metadata_map.get(OPERATORS, "")
    if operators and not has_kernels:
        logger.info("%s runs the portable bodies of %s", path, operators)
    return OnnxRuntime(
        session,
        version=onnxruntime.__version__,
        device=device,
        kernel="native" if operators and has_kernels else "portable",
        bound=_bind(onnxruntime, session, device_id) if is_cuda else None,
    )


def _prepare_cuda(onnxruntime: Any, device: str) -> int:
    """Load the libraries of CUDA.

    Returns: the number of the GPU.
    Raises: BundleError if this build of ONNX Runtime knows no CUDA.
    """
    if CUDA not in onnxruntime.get_available_providers():
        raise BundleError(
            f"SERVICE_DEVICE asks for {device}, but the installed ONNX Runtime has no CUDA; install "
            "onnxruntime-gpu[cuda,cudnn] in its place or set SERVICE_DEVICE=cpu"
        )
    onnxruntime.preload_dlls()
    return int(device.removeprefix("cuda:"))


def _tell_fallback(onnxruntime: Any, device: str) -> str:
    """Say why ONNX Runtime took the CPU although it was asked for a GPU."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    missing = find_missing_library(provider)
    cause = f"{missing} is missing" if missing else "it does not say why; its libraries are there"
    return (
        f"SERVICE_DEVICE asks for {device}, but ONNX Runtime fell back to the CPU: {cause}; install "
        "onnxruntime-gpu[cuda,cudnn], which brings CUDA 13 and cuDNN 9, or set SERVICE_DEVICE=cpu"
    )


def _bind(onnxruntime: Any, session: Any, device_id: int) -> BoundRuns:
    allocate = partial(onnxruntime.OrtValue.ortvalue_from_shape_and_type, device_type="cuda", device_id=device_id)
    return BoundRuns(session, allocate, device_type="cuda", device_id=device_id)


def _register(options: Any, library: Path) -> bool:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # noqa: BLE001 - the library's own exception classes are not public
        logger.warning("%s does not load; programs run their portable bodies: %s", library, error)
        return False
    return True


def _check_installation() -> None:
    builds = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(builds) != 1:
        found = " and ".join(builds) or "none"
        raise BundleError(
            f"found {found}; exactly one of onnxruntime and onnxruntime-gpu must be installed, as both unpack into the "
            "same folder; uninstall both, then install one"
        )


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
