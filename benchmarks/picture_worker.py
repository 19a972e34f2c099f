"""One model of pictures in its own process, so that its peak memory is its own.

`python -m benchmarks.picture_worker NAME SIDE [PROGRAM]`: the module of `BUILDERS`, or its program, answers one picture
of SIDE x SIDE pixels after another. What was measured goes to standard output as one JSON object. One thread computes.
"""

import ctypes
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import BaseModel

CLEAR_REFS, RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # Linux: the peak becomes what is resident now
ENOUGH_SECONDS = 2.0  # of timed calls after the first
MAX_CALLS = 5
SLOW_SECONDS = 10.0  # a model whose first call takes so long is not called again: warming up is little of that
SEED = 3


class PictureFinding(BaseModel):
    """What one process measured.

    Attributes:
        cpu_seconds: the least of the calls, user and system time of the process; the first counts if it is alone.
        peak_bytes: most memory during the first call, beyond what the process had before it with its weights.
    """

    cpu_seconds: float
    peak_bytes: int


def open_module(name: str, side: int) -> Callable[[], object]:
    """The eager module with the weights it starts from; what is computed does not depend on them."""
    import torch  # noqa: PLC0415 - a program's process is without it

    from models import BUILDERS  # noqa: PLC0415 - imports torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = BUILDERS[name](num_classes=150).eval()  # ADE20K's classes
    image = torch.randn(1, 3, side, side)

    def run() -> object:
        with torch.inference_mode():
            return model(image)

    return run


def open_program(path: Path, side: int) -> Callable[[], object]:
    """The program in ONNX Runtime, with one thread."""
    import onnxruntime  # noqa: PLC0415 - a module's process is without it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(SEED).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    return lambda: session.run(["logits"], {"image": image})


def measure(run: Callable[[], object]) -> PictureFinding:
    """Call a model for memory, then for time."""
    # What loading left free on the heap would be resident before, and hide as much of the call.
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _peak_bytes()
    first = _time(run)
    peak = _peak_bytes() - before
    times = [first] if first >= SLOW_SECONDS else []
    while not times or (sum(times) < ENOUGH_SECONDS and len(times) < MAX_CALLS):
        times.append(_time(run))
    return PictureFinding(cpu_seconds=min(times), peak_bytes=peak)


def _time(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "Linux tells the peak"
    return 1024 * int(found[1])


def main() -> None:
    """Measure what the command line names."""
    name, side = sys.argv[1], int(sys.argv[2])
    run = open_program(Path(sys.argv[3]), side) if len(sys.argv) > 3 else open_module(name, side)
    print(measure(run).model_dump_json())


if __name__ == "__main__":
    main()
