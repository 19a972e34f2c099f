"""ONNX Runtime: one session, as many threads as streams call it, one thread inside each call on the CPU.

A request then costs one core, and cores are kept busy by batches beside each other. Threads inside a call do not spin:
spinning steals the cores that decode the next inputs.

A program may hold operators of our own, each with a body in standard operators. On the CPU a library of native kernels
replaces the bodies, if there is one.
"""

import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from service.errors import BundleError
from service.sample import Arrays
from service.settings import count_cores

logger = logging.getLogger(__name__)

OPERATORS = "operators"  # key of a program's metadata: operators of our own in it, for which native kernels may exist
CUDA_STREAMS = 2  # one batch computes while the other is copied


class OnnxRuntime:
    """A program in an ONNX Runtime session; see `Runtime`.

    Args:
        session: an `onnxruntime.InferenceSession`.
        version: of ONNX Runtime.
        device: `cpu` or `cuda`.
        kernel: `portable` or `native`.
    """

    name = "onnx"

    def __init__(self, session: Any, *, version: str, device: str, kernel: str = "portable") -> None:
        self._session = session
        self.version = version
        self.device = device
        self.kernel = kernel
        self.num_streams = CUDA_STREAMS if device == "cuda" else count_cores()

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; see `Runtime.run`."""
        names = list(outputs)
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        """Let go of the session."""
        self._session = None


def open_onnx(path: Path, *, device: str, native_library: Path | None = None) -> OnnxRuntime:
    """Load a program.

    Args:
        path: of the ONNX file.
        device: `cpu`, `cuda`, or `auto`: CUDA where it works.
        native_library: of kernels for our own operators, for the CPU alone; without it, or if it does not load, the
            program's own bodies run.
    Raises: BundleError if the program does not load, if CUDA was asked for and is not used, or if two builds of
        ONNX Runtime are installed over each other.
    """
    _check_installation()
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors; provider fall-back is checked below and reported once
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "cuda" and not has_cuda:
        raise BundleError(
            "SERVICE_DEVICE=cuda, but the installed ONNX Runtime has no CUDA; install onnxruntime-gpu[cuda,cudnn] or "
            "set SERVICE_DEVICE=cpu"
        )
    wants_cuda = device != "cpu" and has_cuda and Path("/proc/driver/nvidia/version").exists()
    if device == "cuda" and not wants_cuda:
        raise BundleError("SERVICE_DEVICE=cuda, but no NVIDIA driver is loaded; load it or set SERVICE_DEVICE=cpu")
    if wants_cuda:
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # With CUDA, a kernel for the CPU would force copies; the bodies run on the GPU.
    has_kernels = native_library is not None and not wants_cuda and _register(options, native_library)
    cpu = "CPUExecutionProvider"
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), cpu] if wants_cuda else [cpu]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # the library's own exception classes are not public
        raise BundleError(f"{path} does not load in ONNX Runtime {onnxruntime.__version__}: {error}") from error
    is_cuda = "CUDAExecutionProvider" in session.get_providers()
    if wants_cuda and not is_cuda:
        fault = (
            "an NVIDIA driver is loaded, but ONNX Runtime fell back to the CPU: a library of CUDA 13 or cuDNN 9 is "
            "missing; install onnxruntime-gpu[cuda,cudnn] or set SERVICE_DEVICE=cpu"
        )
        if device == "cuda":
            raise BundleError(fault)
        logger.warning(fault)
    operators = session.get_modelmeta().custom_metadata_map.get(OPERATORS, "")
    if operators and not has_kernels:
        logger.info("%s runs the portable bodies of %s", path, operators)
    return OnnxRuntime(
        session,
        version=onnxruntime.__version__,
        device="cuda" if is_cuda else "cpu",
        kernel="native" if operators and has_kernels else "portable",
    )


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
