from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from service.errors import BundleError
from service.runtimes import RUNTIMES, onnx
from service.runtimes.onnx import open_onnx
from service.settings import count_cores
from tests.service.tiny_bundle import PROGRAM, SIDE


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def distribution(name: str) -> object:
        if name not in names:
            raise PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(onnx, "distribution", distribution)


def test_the_runtime_is_registered_under_its_name(tiny_bundle: Path) -> None:
    runtime = RUNTIMES["onnx"](tiny_bundle / PROGRAM, device="cpu")
    assert (runtime.name, runtime.device, runtime.kernel) == ("onnx", "cpu", "portable")
    assert runtime.num_streams == count_cores()
    runtime.close()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_only_the_outputs_named_come_back_at_any_batch_size(tiny_bundle: Path, batch: int) -> None:
    runtime = open_onnx(tiny_bundle / PROGRAM, device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8)
    found = runtime.run({"image": images}, ("logits",))
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"], images.mean((1, 2)) / 16, rtol=1e-5)  # sums of float32
    assert list(runtime.run({"image": images}, ("clusters", "logits"))) == ["clusters", "logits"]
    runtime.close()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0a" * 100])
def test_a_file_that_is_no_program_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx does not load in ONNX Runtime"):
        open_onnx(path, device="cpu")


def test_a_program_that_is_cut_off_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((tiny_bundle / PROGRAM).read_bytes()[:-50])
    with pytest.raises(BundleError, match=r"model\.onnx does not load"):
        open_onnx(path, device="cpu")


def test_both_builds_installed_over_each_other_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    pretend_installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(BundleError, match=r"found onnxruntime and onnxruntime-gpu; .*uninstall both, then install one"):
        open_onnx(tiny_bundle / PROGRAM, device="cpu")


def test_no_build_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    pretend_installed(monkeypatch)
    with pytest.raises(BundleError, match="found none; exactly one of onnxruntime and onnxruntime-gpu"):
        open_onnx(tiny_bundle / PROGRAM, device="cpu")


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_either_build_alone_will_do(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, name: str) -> None:
    pretend_installed(monkeypatch, name)
    open_onnx(tiny_bundle / PROGRAM, device="cpu").close()
