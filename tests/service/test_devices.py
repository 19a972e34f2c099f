import logging

import pytest
from prometheus_client import CollectorRegistry

from service.devices import Devices, DeviceState, open_devices
from service.metrics import Metrics
from tests.service.fake_nvml import FakeNvml

NAMES = ("up", "memory_used_bytes", "memory_total_bytes", "utilisation_ratio")


def watched(nvml: FakeNvml) -> CollectorRegistry:
    devices = open_devices(nvml)
    assert devices is not None
    metrics = Metrics()
    metrics.watch(devices)
    return metrics.registry


def values(registry: CollectorRegistry, device: str) -> dict[str, float | None]:
    return {name: registry.get_sample_value(f"inference_device_{name}", {"device": device}) for name in NAMES}


def test_a_device_tells_its_memory_and_use() -> None:
    devices = open_devices(FakeNvml(2))
    assert devices is not None
    assert devices.read() == [
        DeviceState(0, True, 3_000_000, 80_000_000, 0.25),
        DeviceState(1, True, 3_000_001, 80_000_000, 0.25),
    ]


def test_without_the_package_a_driver_or_a_device_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert open_devices(None) is None
    assert open_devices(FakeNvml(0)) is None
    without_driver = FakeNvml()
    without_driver.has_driver = False
    assert open_devices(without_driver) is None
    assert "Driver Not Loaded" in caplog.text


def test_metrics_are_asked_for_at_every_scrape_and_a_loss_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(2)
    registry = watched(nvml)
    assert values(registry, "1") == {
        "up": 1,
        "memory_used_bytes": 3_000_001,
        "memory_total_bytes": 80_000_000,
        "utilisation_ratio": 0.25,
    }
    nvml.lost.add(1)
    assert values(registry, "1") == dict.fromkeys(NAMES) | {"up": 0}
    assert caplog.text.count("GPU 1 does not answer: GPU is lost") == 1
    assert values(registry, "0")["up"] == 1


def test_a_device_that_does_not_tell_its_use_is_up() -> None:
    nvml = FakeNvml()
    nvml.tells_utilisation = False
    found = values(watched(nvml), "0")
    assert (found["up"], found["memory_total_bytes"], found["utilisation_ratio"]) == (1, 80_000_000, None)


def test_a_service_without_devices_has_no_metrics_of_them() -> None:
    assert not {
        sample.name for family in Metrics().registry.collect() for sample in family.samples if "device" in sample.name
    }


def test_devices_that_nvml_really_has_answer() -> None:
    devices = open_devices()
    if devices is None:
        pytest.skip("needs an NVIDIA GPU, its driver and nvidia-ml-py")
    assert isinstance(devices, Devices)
    assert all(state.is_up and state.memory_total_bytes for state in devices.read())
