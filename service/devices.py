"""The NVIDIA GPUs of this machine, as NVML tells of them: memory, use, and whether they still answer.

NVML's package, nvidia-ml-py, is part of the GPU set alone. Where it, the driver or a GPU is missing there are no
devices, and no metrics of them. MIG instances are not told apart: the numbers are those of the whole GPU.
"""

import logging
from dataclasses import dataclass
from typing import Any

try:
    import pynvml
except ImportError:  # a set without CUDA
    pynvml = None

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One GPU at one moment.

    Attributes:
        index: NVML's; `CUDA_VISIBLE_DEVICES` does not change it.
        is_up: whether it answered. A GPU that fell off the bus does not until the machine starts anew.
        memory_used_bytes: by all processes; None if it did not answer.
        memory_total_bytes: None if it did not answer.
        utilisation_ratio: share of the time in which some kernel ran; None where NVML does not tell, as with MIG.
    """

    index: int
    is_up: bool
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilisation_ratio: float | None = None


class Devices:
    """The GPUs that were there at start.

    Args:
        nvml: the module `pynvml`, initialised.
        handles: of the GPUs, in NVML's order.
    """

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._lost: set[int] = set()

    def read(self) -> list[DeviceState]:
        """Ask every GPU; one that does not answer is down, not absent."""
        return [self._read(index, handle) for index, handle in enumerate(self._handles)]

    def _read(self, index: int, handle: Any) -> DeviceState:
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        except self._nvml.NVMLError as error:
            if index not in self._lost:  # once, not at every scrape
                self._lost.add(index)
                logger.warning("GPU %d does not answer: %s", index, error)
            return DeviceState(index, is_up=False)
        try:
            utilisation = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100  # NVML gives percent
        except self._nvml.NVMLError:
            utilisation = None
        return DeviceState(index, True, memory.used, memory.total, utilisation)


def open_devices(nvml: Any = pynvml) -> Devices | None:
    """Find the GPUs.

    Args:
        nvml: the module `pynvml`; None where it is not installed.
    Returns: None where there are none.
    """
    if nvml is None:
        return None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        logger.info("no metrics of GPUs: %s", error)
        return None
    return Devices(nvml, handles) if handles else None
