"""ONNX Runtime as it would be on a machine with GPUs, as far as `service.runtimes.onnx` uses it; it doubles `x`."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from service.runtimes.onnx import CPU, CUDA


class FakeOrtValue:
    """A buffer on a device."""

    made: ClassVar[list["FakeOrtValue"]] = []

    def __init__(self, shape: Sequence[int], dtype: Any, place: tuple[str, int]) -> None:
        self.array, self.place = np.zeros(shape, dtype), place
        FakeOrtValue.made.append(self)

    @classmethod
    def ortvalue_from_shape_and_type(
        cls, shape: Sequence[int], dtype: Any, *, device_type: str, device_id: int
    ) -> "FakeOrtValue":
        return cls(shape, dtype, (device_type, device_id))

    def update_inplace(self, array: Any) -> None:
        assert (self.array.shape, self.array.dtype) == (array.shape, array.dtype)
        self.array[...] = array


class FakeBinding:
    """What is bound, by name."""

    def __init__(self) -> None:
        self.inputs: dict[str, FakeOrtValue] = {}
        self.outputs: dict[str, tuple[str, int]] = {}
        self.found: list[Any] = []

    def clear_binding_inputs(self) -> None:
        self.inputs = {}

    def clear_binding_outputs(self) -> None:
        self.outputs = {}

    def bind_ortvalue_input(self, name: str, value: FakeOrtValue) -> None:
        self.inputs[name] = value

    def bind_output(self, name: str, device_type: str, device_id: int) -> None:
        self.outputs[name] = (device_type, device_id)

    def copy_outputs_to_cpu(self) -> list[Any]:
        return self.found


class FakeSession:
    """Remembers how it was opened and which way each run came."""

    def __init__(self, path: object, options: object, *, providers: list[Any], has_cuda: bool = True) -> None:
        self.providers, self.has_cuda = providers, has_cuda
        self.calls: list[str] = []
        self.bindings: list[FakeBinding] = []
        self.failure: Exception | None = None

    def get_providers(self) -> list[str]:
        names = [one if isinstance(one, str) else one[0] for one in self.providers]
        return names if self.has_cuda else [CPU]

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map={})

    def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
        self.calls.append("plain")
        return [inputs["x"] * 2 for _ in names]

    def io_binding(self) -> FakeBinding:
        self.bindings.append(FakeBinding())
        return self.bindings[-1]

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        self.calls.append("bound")
        if self.failure is not None:
            raise self.failure
        binding.found = [binding.inputs["x"].array * 2 for _ in binding.outputs]


class FakeOptions:
    """Takes any option."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        pass


def make_fake(*, has_cuda: bool = True, is_built_with_cuda: bool = True) -> SimpleNamespace:
    """Make the module.

    Args:
        has_cuda: whether sessions that ask for CUDA get it; if not they fall back silently.
        is_built_with_cuda: whether this is the build for GPUs.
    """
    FakeOrtValue.made = []

    def open_session(path: object, options: object, *, providers: list[Any]) -> FakeSession:
        return FakeSession(path, options, providers=providers, has_cuda=has_cuda)

    return SimpleNamespace(
        __version__="1.0",
        __file__="/nowhere/onnxruntime/__init__.py",
        set_default_logger_severity=lambda level: None,
        get_available_providers=lambda: [CUDA, CPU] if is_built_with_cuda else [CPU],
        preload_dlls=lambda: None,
        SessionOptions=FakeOptions,
        InferenceSession=open_session,
        OrtValue=FakeOrtValue,
    )
