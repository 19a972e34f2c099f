"""ONNX programs on GPUs, by a fake of the library; the tests marked `gpu` run the real one."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.errors import BundleError
from service.runtimes import onnx
from service.runtimes.cuda import count_gpus, find_missing_library
from service.runtimes.onnx import CUDA, OnnxRuntime, open_onnx
from service.runtimes.onnx_binding import KEPT_SHAPES, BoundRuns
from tests.service.runtimes.fake_onnxruntime import FakeOrtValue, FakeSession, make_fake
from tests.service.tiny_bundle import PROGRAM, SIDE

PATH = Path("model.onnx")


def install(monkeypatch: pytest.MonkeyPatch, fake: SimpleNamespace) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)  # type: ignore[arg-type]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> OnnxRuntime:
    """A program on the third GPU of a machine that has them."""
    install(monkeypatch, make_fake())
    return open_onnx(PATH, device="cuda:2")


def ones(*shape: int) -> dict[str, Any]:
    return {"x": np.ones(shape, np.float32)}


def test_a_gpu_runs_bound_and_the_cpu_does_not(monkeypatch: pytest.MonkeyPatch, on_gpu: OnnxRuntime) -> None:
    on_cpu = open_onnx(PATH, device="cpu")
    for runtime, way in ((on_gpu, "bound"), (on_cpu, "plain")):
        found = runtime.run(ones(2, 3), ("y",))
        np.testing.assert_array_equal(found["y"], np.full((2, 3), 2.0, np.float32), strict=True)
        assert runtime._session.calls == [way]
    assert (on_gpu.device, on_gpu.num_streams, on_cpu.device) == ("cuda:2", 2, "cpu")


def test_the_gpu_named_is_used_without_tf32_and_with_a_frugal_arena(on_gpu: OnnxRuntime) -> None:
    (name, options), cpu = on_gpu._session.providers
    assert (name, cpu) == (CUDA, "CPUExecutionProvider")
    assert options["device_id"] == "2"
    assert options["use_tf32"] == "0"
    assert options["arena_extend_strategy"] == "kSameAsRequested"


def test_only_the_outputs_named_are_bound_at_every_run(on_gpu: OnnxRuntime) -> None:
    assert list(on_gpu.run(ones(1, 3), ("y", "z"))) == ["y", "z"]
    assert list(on_gpu.run(ones(1, 3), ("z",))) == ["z"]
    assert on_gpu._session.bindings[0].outputs == {"z": ("cuda", 2)}


def test_buffers_are_used_again_for_the_same_shape_and_are_few(on_gpu: OnnxRuntime) -> None:
    for size in (1, 2, 1, 2):
        on_gpu.run(ones(size, 3), ("y",))
    assert [value.place for value in FakeOrtValue.made] == [("cuda", 2)] * 2
    for size in range(3, 3 + KEPT_SHAPES):  # two more shapes than are kept: the oldest ones go
        on_gpu.run(ones(size, 3), ("y",))
    on_gpu.run(ones(2 + KEPT_SHAPES, 3), ("y",))
    assert len(FakeOrtValue.made) == 2 + KEPT_SHAPES
    on_gpu.run(ones(1, 3), ("y",))
    assert len(FakeOrtValue.made) == 3 + KEPT_SHAPES
    assert len(on_gpu._session.bindings) == 1


def test_runs_beside_each_other_share_no_buffer(on_gpu: OnnxRuntime) -> None:
    session: FakeSession = on_gpu._session
    run = session.run_with_iobinding

    def run_amid(binding: Any) -> None:
        if len(session.bindings) == 1:
            on_gpu.run({"x": np.zeros((2, 3), np.float32)}, ("y",))  # a second one while the first is in flight
        run(binding)

    session.run_with_iobinding = run_amid  # type: ignore[method-assign]
    assert on_gpu.run(ones(2, 3), ("y",))["y"].max() == 2
    assert len(session.bindings) == 2


def test_buffers_of_a_failed_run_are_not_used_again(on_gpu: OnnxRuntime) -> None:
    on_gpu._session.failure = RuntimeError("CUDA failure 700")
    with pytest.raises(RuntimeError, match="700"):
        on_gpu.run(ones(1, 3), ("y",))
    on_gpu._session.failure = None
    on_gpu.run(ones(1, 3), ("y",))
    assert len(on_gpu._session.bindings) == 2


def test_a_silent_fallback_is_refused_and_the_missing_library_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, make_fake(has_cuda=False))
    monkeypatch.setattr(onnx, "find_missing_library", lambda library: "libcudnn.so.9")
    with pytest.raises(
        BundleError, match=r"asks for cuda:0, but .* fell back to the CPU: libcudnn.so.9 is missing; .*"
    ):
        open_onnx(PATH, device="cuda:0")


def test_a_build_without_cuda_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, make_fake(is_built_with_cuda=False))
    with pytest.raises(BundleError, match=r"has no CUDA; install onnxruntime-gpu\[cuda,cudnn\]"):
        open_onnx(PATH, device="cuda:0")


def test_a_missing_library_is_named_by_the_linker(tmp_path: Path) -> None:
    assert find_missing_library(tmp_path / "libnone.so") == str(tmp_path / "libnone.so")
    assert find_missing_library(Path("libc.so.6")) is None
    (tmp_path / "libtext.so").write_text("no library")
    assert find_missing_library(tmp_path / "libtext.so") is None


def test_the_real_library_without_a_gpu_is_refused(tiny_bundle: Path) -> None:
    if find_spec("onnxruntime") is None or count_gpus():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(BundleError, match=r"SERVICE_DEVICE asks for cuda:0, but .* set SERVICE_DEVICE=cpu"):
        open_onnx(tiny_bundle / PROGRAM, device="cuda:0")


def test_bound_runs_of_a_real_session_give_what_plain_ones_do(tiny_bundle: Path) -> None:
    import onnxruntime

    runtime = open_onnx(tiny_bundle / PROGRAM, device="cpu")
    bound = BoundRuns(
        runtime._session, onnxruntime.OrtValue.ortvalue_from_shape_and_type, device_type="cpu", device_id=0
    )
    rng = np.random.default_rng(0)
    for size in (2, 3, 2):
        images = rng.integers(0, 256, (size, SIDE, SIDE, 3), np.uint8)
        images.flags.writeable = False  # as the batcher's
        for outputs in (("logits",), ("clusters", "logits")):
            found, expected = bound.run({"image": images}, outputs), runtime.run({"image": images}, outputs)
            assert list(found) == list(outputs)
            for name in outputs:
                np.testing.assert_array_equal(found[name], expected[name], strict=True)
    runtime.close()


@pytest.mark.gpu
def test_a_gpu_that_was_asked_for_is_used(tiny_bundle: Path) -> None:
    runtime = open_onnx(tiny_bundle / PROGRAM, device="cuda:0")
    assert runtime.device == "cuda:0"
    rng = np.random.default_rng(0)
    for size in (3, 1, 3):
        images = rng.integers(0, 256, (size, SIDE, SIDE, 3), np.uint8)
        found = runtime.run({"image": images}, ("logits",))
        np.testing.assert_allclose(found["logits"], images.mean((1, 2)) / 16, rtol=1e-5)  # sums of float32
    runtime.close()
