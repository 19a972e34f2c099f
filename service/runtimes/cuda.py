"""The GPUs that this process sees, as CUDA's driver counts them, and what of CUDA is missing; takes no memory there."""

import ctypes
import re
from pathlib import Path

from service.errors import BundleError

DRIVER = "libcuda.so.1"  # what NVIDIA's driver brings
# How Linux's dynamic linker says that it did not find a library that another one needs.
_NOT_FOUND = re.compile(r"(\S+): cannot open shared object file")


def count_gpus() -> int:
    """Count the GPUs; `CUDA_VISIBLE_DEVICES` narrows them. 0 where there is no driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0
    number = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):
        return 0
    return number.value


def name_gpu(index: int) -> str:
    """Give a GPU's product name; "" where there is none."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ""
    device, text = ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return ""
    driver.cuDeviceGetName(text, len(text), device)
    return text.value.decode()


def list_devices(setting: str) -> tuple[str, ...]:
    """Name the devices that a setting stands for.

    Args:
        setting: `auto`, `cpu`, `cuda` or GPUs by number, `cuda:0,cuda:1`, as the settings checked it. `cuda` is every
            GPU; so is `auto` where there are some.
    Returns: `cpu`, or `cuda:N` for each GPU.
    Raises: BundleError if GPUs are asked for that are not there.
    """
    if setting == "cpu":
        return ("cpu",)
    number = count_gpus()
    gpus = tuple(f"cuda:{index}" for index in range(number))
    if setting == "auto":
        return gpus or ("cpu",)
    if not gpus:
        raise BundleError(
            f"SERVICE_DEVICE={setting}, but no NVIDIA driver is loaded that shows a GPU to this process; load it "
            "(in a container: the NVIDIA Container Toolkit) or set SERVICE_DEVICE=cpu"
        )
    if setting == "cuda":
        return gpus
    named = tuple(setting.split(","))
    if missing := [device for device in named if device not in gpus]:
        raise BundleError(
            f"SERVICE_DEVICE={setting}, but there is no {', '.join(missing)}; this process sees {', '.join(gpus)}; "
            "name some of these"
        )
    return named


def find_missing_library(library: Path) -> str | None:
    """Name what a library cannot be loaded without; None if it is not that.

    Args:
        library: to be loaded.
    """
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        found = _NOT_FOUND.match(str(error))
        return found[1] if found else None
    return None
