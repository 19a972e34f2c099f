"""The service on GPUs that are not there: programs on the CPU that say that they are on one, and fail when told."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from service.errors import BundleError
from service.runtimes import RUNTIMES, by_device
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays
from tests.service.conftest import Serve
from tests.service.tiny_bundle import NAME

pytestmark = pytest.mark.anyio

BROKEN = "cuda:7"  # from the start
PATH = "/v1/image-classification"
PNG = {"Content-Type": "image/png"}


class Gpu(OnnxRuntime):
    """Computes until it is lost."""

    is_lost = False

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        if self.is_lost:
            raise RuntimeError("CUDA failure 719 at /secret/path")
        return super().run(inputs, outputs)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gpu]:
    """Two of them, by name, once a service was started."""
    opened: dict[str, Gpu] = {}

    def open_gpu(path: Path, *, device: str, native_library: Path | None) -> Gpu:
        assert native_library is None or native_library.exists()
        one = open_onnx(path, device="cpu")
        opened[device] = Gpu(one._session, version=one.version, device=device)
        opened[device].is_lost = device == BROKEN
        return opened[device]

    monkeypatch.setitem(RUNTIMES, "onnx", open_gpu)
    monkeypatch.setattr(by_device, "list_devices", lambda setting: tuple(setting.split(",")))
    return opened


async def test_requests_are_answered_while_one_gpu_is_left_and_told_to_come_back_when_none_is(
    serve: Serve, gpus: dict[str, Gpu], make_picture: Callable[..., bytes]
) -> None:
    async with serve(device="cuda:0,cuda:1", workers=0) as client:
        assert (await client.get("/v1/models")).json()["data"][0]["device"] == "cuda:0,cuda:1"
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        gpus["cuda:0"].is_lost = True
        for _ in range(3):
            assert (await client.post(PATH, content=make_picture((160, 0, 80)), headers=PNG)).status_code == 200
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready", "lost_devices": ["cuda:0"]})
        metrics = (await client.get("/metrics")).text.splitlines()
        assert f'inference_model_device_up{{device="cuda:0",model="{NAME}"}} 0.0' in metrics
        assert f'inference_model_device_up{{device="cuda:1",model="{NAME}"}} 1.0' in metrics

        gpus["cuda:1"].is_lost = True
        for _ in range(2):
            answer = await client.post(PATH, content=make_picture((160, 0, 80)), headers=PNG)
            assert (answer.status_code, answer.json()["code"]) == (503, "device_lost")
            assert int(answer.headers["retry-after"]) >= 1
            assert "secret" not in answer.text
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["code"]) == (503, "device_lost")
        assert (await client.get("/health/live")).json() == {"status": "live"}


async def test_a_fault_of_the_batch_on_the_cpu_stays_its_own(
    serve: Serve, gpus: dict[str, Gpu], make_picture: Callable[..., bytes]
) -> None:
    async with serve(device="cpu") as client:
        gpus["cpu"].is_lost = True
        answer = await client.post(PATH, content=make_picture((1, 2, 3)), headers=PNG)
        assert (answer.status_code, answer.json()["code"]) == (500, "model_failed")
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
        gpus["cpu"].is_lost = False
        assert (await client.post(PATH, content=make_picture((1, 2, 3)), headers=PNG)).status_code == 200


async def test_every_gpu_reproduces_the_golden_outputs_before_the_service_is_ready(
    serve: Serve, gpus: dict[str, Gpu]
) -> None:
    with pytest.raises(BundleError, match=f"{NAME}: the program does not run on its golden inputs"):
        async with serve(device="cuda:0,cuda:7"):
            pass
    assert all(gpu._session is None for gpu in gpus.values())


@pytest.mark.multi_gpu
async def test_real_gpus_share_the_work(serve: Serve, make_picture: Callable[..., bytes]) -> None:
    async with serve(device="cuda:0,cuda:1", workers=0) as client:
        assert (await client.get("/v1/models")).json()["data"][0]["device"] == "cuda:0,cuda:1"
        for _ in range(8):
            assert (await client.post(PATH, content=make_picture((160, 0, 80)), headers=PNG)).status_code == 200
