"""Runs of an ONNX session whose inputs lie in the memory of a GPU: the buffers are made once and used again.

Each run in flight has a stream of its own, a binding with its buffers, so that one copies its inputs while another one
computes. Only the outputs named are computed to the end and copied back.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from service.sample import AnyArray, Arrays

KEPT_SHAPES = 16  # buffers of a stream for each input: batches differ in size and length, and memory is finite

Allocate = Callable[[Sequence[int], Any], Any]  # shape, dtype → an `onnxruntime.OrtValue` on the device


class BoundRuns:
    """Streams of one session; a run takes a free one.

    Args:
        session: an `onnxruntime.InferenceSession`.
        allocate: makes a buffer.
        device_type: `cuda`; where outputs are left until they are copied.
        device_id: number of the GPU.
    """

    def __init__(self, session: Any, allocate: Allocate, *, device_type: str, device_id: int) -> None:
        self._session, self._allocate = session, allocate
        self._place = (device_type, device_id)
        self._free: list[_Stream] = []  # threads share it: append and pop are atomic

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a batch; see `Runtime.run`."""
        try:
            stream = self._free.pop()
        except IndexError:
            stream = _Stream(self._session.io_binding(), self._allocate)
        stream.bind(inputs, outputs, *self._place)
        self._session.run_with_iobinding(stream.binding)
        found = dict(zip(outputs, stream.binding.copy_outputs_to_cpu(), strict=True))
        self._free.append(stream)  # not after a failure: nobody knows what is left of its buffers then
        return found


class _Stream:
    def __init__(self, binding: Any, allocate: Allocate) -> None:
        self.binding, self._allocate = binding, allocate
        self._held: dict[str, OrderedDict[tuple[Any, ...], Any]] = {}

    def bind(self, inputs: Arrays, outputs: Sequence[str], device_type: str, device_id: int) -> None:
        self.binding.clear_binding_inputs()
        for name, array in inputs.items():
            buffer = self._hold(name, array)
            buffer.update_inplace(array)
            self.binding.bind_ortvalue_input(name, buffer)
        self.binding.clear_binding_outputs()  # or the last run's outputs would be the buffers of this one
        for name in outputs:
            self.binding.bind_output(name, device_type, device_id)

    def _hold(self, name: str, array: AnyArray) -> Any:
        """Give the buffer for arrays of this shape; the one that was used longest ago makes room."""
        held = self._held.setdefault(name, OrderedDict())
        key = (array.shape, array.dtype)
        if key not in held:
            if len(held) == KEPT_SHAPES:
                held.popitem(last=False)
            held[key] = self._allocate(list(array.shape), array.dtype.type)
        held.move_to_end(key)
        return held[key]
