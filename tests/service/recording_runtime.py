"""A runtime that remembers which outputs it was asked for."""

from collections.abc import Sequence
from pathlib import Path

from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays


class RecordingRuntime(OnnxRuntime):
    """Remembers, in `asked`, the outputs of each call."""

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        self.asked = [*getattr(self, "asked", []), tuple(outputs)]
        return super().run(inputs, outputs)


def record_runs(path: Path, *, device: str, native_library: Path | None) -> RecordingRuntime:
    """Open one; to stand in `RUNTIMES`."""
    opened = open_onnx(path, device=device, native_library=native_library)
    return RecordingRuntime(opened._session, version=opened.version, device=opened.device)
