import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from service.errors import BundleError
from service.runtimes import RUNTIMES
from service.runtimes.torchscript import TorchScriptRuntime, open_torchscript
from service.settings import count_cores
from tests.service.runtimes.mean_colours import PROGRAM, write_archive
from tests.service.tiny_bundle import SIDE

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("torchscript") / PROGRAM)


@pytest.fixture
def runtime(archive: Path) -> Iterator[TorchScriptRuntime]:
    opened = open_torchscript(archive, device="cpu")
    yield opened
    opened.close()


@pytest.fixture
def _three_threads() -> Iterator[None]:
    number = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(number)


def make_images(batch: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8)


def test_the_runtime_is_registered_under_its_name(archive: Path) -> None:
    runtime = RUNTIMES["torchscript"](archive, device="cpu", native_library=None)
    assert (runtime.name, runtime.device, runtime.kernel) == ("torchscript", "cpu", "portable")
    assert runtime.version == torch.__version__
    assert runtime.num_streams == count_cores()
    runtime.close()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_only_the_outputs_named_come_back_at_any_batch_size(runtime: TorchScriptRuntime, batch: int) -> None:
    images = make_images(batch)
    found = runtime.run({"image": images}, ("logits",))
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"], images.mean((1, 2)) / 16, rtol=1e-5)  # sums of float32
    assert list(runtime.run({"image": images}, ("clusters", "logits"))) == ["clusters", "logits"]


def test_a_part_of_an_array_that_must_not_be_written_to_goes_in(runtime: TorchScriptRuntime) -> None:
    images = make_images(6)[::-2]
    images.setflags(write=False)  # as the batcher's are
    found = runtime.run({"image": images}, ("logits",))
    np.testing.assert_allclose(found["logits"], images.mean((1, 2)) / 16, rtol=1e-5)  # sums of float32


@pytest.mark.usefixtures("_three_threads")
def test_several_threads_call_at_once_each_with_one_thread_of_torch(runtime: TorchScriptRuntime) -> None:
    def work(seed: int) -> tuple[bool, int]:
        images = make_images(1 + seed % 3, seed=seed)
        found = runtime.run({"image": images}, ("logits",))["logits"]
        return np.allclose(found, images.mean((1, 2)) / 16, rtol=1e-5), torch.get_num_threads()

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(work, range(32))) == {(True, 1)}
    assert torch.get_num_threads() == 3, "a thread that runs no program keeps its own number"


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" * 100])
def test_a_file_that_is_no_program_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / PROGRAM
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.pt does not load in torch"):
        open_torchscript(path, device="cpu")


def test_a_program_that_is_cut_off_is_refused(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / PROGRAM
    path.write_bytes(archive.read_bytes()[:-50])
    with pytest.raises(BundleError, match=r"model\.pt does not load"):
        open_torchscript(path, device="cpu")


@pytest.mark.parametrize("extra", [{"other": "x"}, {"tensors.json": "{}"}, {"tensors.json": "nothing"}])
def test_a_program_that_does_not_name_its_tensors_is_refused(tmp_path: Path, extra: dict[str, str]) -> None:
    with pytest.raises(BundleError, match=r"model\.pt does not load"):
        open_torchscript(write_archive(tmp_path / PROGRAM, **extra), device="cpu")


def test_without_torch_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BundleError, match=r"needs torch, which is not installed; .*SERVICE_RUNTIME=auto"):
        open_torchscript(archive, device="cpu")


def test_a_gpu_that_torch_does_not_find_is_refused_with_the_remedy(archive: Path) -> None:
    with pytest.raises(BundleError, match=r"asks for cuda:99, but torch .* set SERVICE_DEVICE=cpu"):
        open_torchscript(archive, device="cuda:99")


@pytest.mark.gpu
def test_cuda_that_was_asked_for_is_used(archive: Path) -> None:
    runtime = open_torchscript(archive, device="cuda:0")
    assert runtime.device == "cuda:0"
    images = make_images(3)
    found = runtime.run({"image": images}, ("logits",))
    np.testing.assert_allclose(found["logits"], images.mean((1, 2)) / 16, rtol=1e-5)  # sums of float32
    runtime.close()
