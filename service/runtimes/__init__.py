from collections.abc import Callable

from service.runtimes.onnx import open_onnx
from service.runtimes.runtime import Runtime
from service.runtimes.torchscript import open_torchscript

# Runtime, as manifests name it → function that opens a program: (path, device=…, native_library=…) → Runtime.
# The device is `cpu` or one GPU, `cuda:N`: what a setting stands for is found out before, in `by_device`.
# A setting chooses among a bundle's programs; where it leaves the choice, the first runtime here wins.
RUNTIMES: dict[str, Callable[..., Runtime]] = {"onnx": open_onnx, "torchscript": open_torchscript}
