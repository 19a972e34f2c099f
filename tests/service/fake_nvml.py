"""Stands for the module `pynvml` on a machine without a GPU."""

from typing import NamedTuple


class Memory(NamedTuple):
    """As NVML gives it, bytes."""

    used: int
    total: int


class Utilisation(NamedTuple):
    """As NVML gives it, percent."""

    gpu: int


class FakeNvml:
    """Some GPUs; a handle is the GPU's index.

    Attributes:
        num_devices: as many GPUs.
        lost: those that do not answer any more.
        tells_utilisation: false stands for MIG.
        has_driver: false stands for a machine without one.
    """

    class NVMLError(Exception):
        """What every call may raise."""

    def __init__(self, num_devices: int = 1) -> None:
        self.num_devices = num_devices
        self.lost: set[int] = set()
        self.tells_utilisation = True
        self.has_driver = True

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        if not self.has_driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.num_devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Memory:  # noqa: N802
        if handle in self.lost:
            raise self.NVMLError("GPU is lost")
        return Memory(used=3_000_000 + handle, total=80_000_000)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Utilisation:  # noqa: N802
        if not self.tells_utilisation:
            raise self.NVMLError("Not Supported")
        return Utilisation(gpu=25)
