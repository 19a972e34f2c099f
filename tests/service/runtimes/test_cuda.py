import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import BundleError
from service.runtimes import cuda
from service.runtimes.cuda import count_gpus, list_devices, name_gpu


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(cuda, "count_gpus", lambda: number)


@pytest.mark.parametrize(
    ("setting", "number", "expected"),
    [
        ("auto", 0, ("cpu",)),
        ("auto", 2, ("cuda:0", "cuda:1")),
        ("cpu", 2, ("cpu",)),
        ("cuda", 1, ("cuda:0",)),
        ("cuda", 3, ("cuda:0", "cuda:1", "cuda:2")),
        ("cuda:1", 2, ("cuda:1",)),
        ("cuda:2,cuda:0", 3, ("cuda:2", "cuda:0")),
    ],
)
def test_a_setting_stands_for_devices(
    monkeypatch: pytest.MonkeyPatch, setting: str, number: int, expected: tuple[str, ...]
) -> None:
    pretend_gpus(monkeypatch, number)
    assert list_devices(setting) == expected


@pytest.mark.parametrize("setting", ["cuda", "cuda:0", "cuda:0,cuda:1"])
def test_without_a_gpu_asking_for_one_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(BundleError, match=rf"SERVICE_DEVICE={setting}, but .* set SERVICE_DEVICE=cpu"):
        list_devices(setting)


def test_a_gpu_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(BundleError, match="there is no cuda:2; this process sees cuda:0, cuda:1"):
        list_devices("cuda:1,cuda:2")


def make_driver(number: int, *, status: int = 0) -> SimpleNamespace:
    """CUDA's driver with so many GPUs; its initialisation gives this status."""

    def count(found: Any) -> int:
        found._obj.value = number
        return 0

    def get(device: Any, index: int) -> int:
        device._obj.value = 100 + index
        return 0 if index < number else 101

    def name(text: Any, size: int, device: Any) -> int:
        text.value = f"GPU with handle {device.value}".encode()[: size - 1]
        return 0

    return SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetCount=count, cuDeviceGet=get, cuDeviceGetName=name)


def test_gpus_are_counted_and_named_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": lambda name: make_driver(2)}))
    assert (count_gpus(), name_gpu(1), name_gpu(2)) == (2, "GPU with handle 101", "")
    failing = make_driver(2, status=999)
    monkeypatch.setattr(cuda, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": lambda name: failing}))
    assert (count_gpus(), name_gpu(0)) == (0, "")


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DRIVER", "libnone.so.1")
    assert (count_gpus(), name_gpu(0)) == (0, "")
