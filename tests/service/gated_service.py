"""The service as a process whose program stands behind a gate: `python -m tests.service.gated_service FOLDER`.

A batch with a bright picture waits until the file `open` is in FOLDER; dark ones, such as the golden inputs, pass. Each
batch, when its turn comes, adds a line to the file `runs`: the first value of each of its pictures.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from service.__main__ import main
from service.runtimes import RUNTIMES
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays

BRIGHT = 128
FOLDER = Path(sys.argv[1])


class GatedRuntime(OnnxRuntime):
    """Runs a program once the gate is open."""

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        with (FOLDER / "runs").open("a") as file:
            file.write(json.dumps(inputs["image"][:, 0, 0, 0].tolist()) + "\n")
        while inputs["image"].max() >= BRIGHT and not (FOLDER / "open").exists():
            time.sleep(0.005)
        return super().run(inputs, outputs)


def open_gated(path: Path, *, device: str, native_library: Path | None) -> GatedRuntime:
    opened = open_onnx(path, device=device, native_library=native_library)
    return GatedRuntime(opened._session, version=opened.version, device=opened.device)


if __name__ == "__main__":
    RUNTIMES["onnx"] = open_gated
    sys.exit(main())
