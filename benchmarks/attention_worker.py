"""One kind of attention in its own process: `python -m benchmarks.attention_worker KIND [PROGRAM [LIBRARY]]`.

Its peak memory is then its own. Reads jobs from standard input and writes what it measured to standard output, one JSON
object a line each. Without a program the kind is torch's fused full attention. One thread computes.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

NUM_HEADS, HEAD_DIM, NUM_PLANES = 8, 64, 63
SEED = 3
CLEAR_REFS, RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # Linux: the peak becomes what is resident now


class Job(BaseModel):
    """What to measure.

    Attributes:
        num_tokens: N, queries and keys.
        repeats: calls that are timed, after one that is not.
    """

    num_tokens: int
    repeats: int


class Finding(BaseModel):
    """What a job measured.

    Attributes:
        cpu_seconds: the least of the calls, user and system time of the process.
        wall_seconds: the least of the calls.
        peak_bytes: most memory during the first call of this job, beyond what the process had with its inputs before
            it; less where an earlier job has left memory to the session.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


def make_inputs(num_tokens: int) -> dict[str, Any]:
    """Random heads of one sample, all tokens real: what the operator takes, by name."""
    rng = np.random.default_rng(SEED)
    q, k, v = rng.standard_normal((3, 1, NUM_HEADS, num_tokens, HEAD_DIM), dtype=np.float32)
    lengths = np.array([num_tokens])
    planes = rng.standard_normal((NUM_PLANES, HEAD_DIM + 1), dtype=np.float32)
    return {"q": q, "k": k, "v": v, "planes": planes, "query_lengths": lengths, "key_lengths": lengths}


def open_torch() -> Callable[[dict[str, Any]], object]:
    """Full attention as torch's fused kernel does it."""
    import torch  # noqa: PLC0415 - in the other contestants it would count as their memory

    torch.set_num_threads(1)

    @torch.inference_mode()
    def run(inputs: dict[str, Any]) -> object:
        q, k, v = (torch.from_numpy(inputs[name]) for name in ("q", "k", "v"))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return run


def open_program(path: Path, library: Path | None) -> Callable[[dict[str, Any]], object]:
    """An ONNX program, with the native kernel if its library is named."""
    import onnxruntime  # noqa: PLC0415 - as above

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # an arena would keep memory that the next job would not seem to need
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})


def measure(run: Callable[[dict[str, Any]], object], job: Job) -> Finding:
    """Do a job."""
    inputs = make_inputs(job.num_tokens)
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _current_bytes()
    run(inputs)
    peak = max(0, _peak_bytes() - before)
    times = []
    for _ in range(job.repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        run(inputs)
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return Finding(
        cpu_seconds=min(cpu for cpu, _ in times), wall_seconds=min(wall for _, wall in times), peak_bytes=peak
    )


def _peak_bytes() -> int:
    # Not getrusage: its figure cannot be reset, and a process starts with that of the one that started it.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "Linux tells the peak"
    return 1024 * int(found[1])


def _current_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Do jobs until standard input ends."""
    arguments = [Path(argument) for argument in sys.argv[2:]]
    run = open_program(arguments[0], arguments[1] if len(arguments) > 1 else None) if arguments else open_torch()
    for line in sys.stdin:
        print(measure(run, Job.model_validate_json(line)).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
