"""One rank of a group that measures sequence parallelism: `torchrun … -m benchmarks.parallel_worker JOBS FOLDER`.

Does the jobs of a JSON file in order and writes what it measured to a file of its own in the folder. One thread
computes; messages go by gloo.
"""

import ctypes
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from benchmarks.attention_worker import CLEAR_REFS, RESET_PEAK
from models.clustered_attention import ClusteredAttentionConfig
from models.ctc_transformer import CTC_TRANSFORMER_SMALL, CtcTransformer
from models.parallel.assignment import assign_clusters
from models.parallel.cluster_plan import ClusterPlan
from models.parallel.clustered import clustered_attention
from models.parallel.collectives import Communicator
from models.parallel.speech import parallelize
from models.parallel.usp import SequenceParallel, sequence_mesh

Way = Literal["Ulysses", "ring", "USP", "clustered", "segment-local", "recogniser"]
NUM_HEADS, HEAD_DIM, NUM_CLUSTERS, NUM_SEGMENTS, NUM_PLANES = 8, 64, 256, 8, 63
NUM_ITERATIONS = 3  # of the clustering; messages do not depend on it
FRAMES_PER_TOKEN, NUM_MELS, NUM_CLASSES = 2, 80, 32
TIMEOUT_SECONDS = 240.0  # ranks that share one core may be far apart


class Job(BaseModel):
    """What to measure.

    Attributes:
        way: of spreading attention, or the speech recogniser with clustered attention.
        length: tokens.
        has_backward: whether gradients are computed, too.
    """

    way: Way
    length: int
    has_backward: bool = False


class Finding(BaseModel):
    """What one rank measured of a job.

    Attributes:
        job: what it was.
        assignment_bytes, forward_bytes, backward_bytes: sent.
        peak_bytes: most memory beyond what the process had with its inputs before.
        wall_seconds: of all.
    """

    job: Job
    assignment_bytes: int
    forward_bytes: int
    backward_bytes: int
    peak_bytes: int
    wall_seconds: float


def measure(job: Job) -> Finding:
    """Do a job on this rank."""
    run = prepare_model(job) if job.way == "recogniser" else prepare_attention(job)
    # What earlier jobs freed goes back to Linux: otherwise it would not count as memory of this one.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    dist.barrier()
    CLEAR_REFS.write_text(RESET_PEAK)
    before, started = memory_bytes("VmRSS"), time.perf_counter()
    marks = list(run())
    seconds, peak = time.perf_counter() - started, max(0, memory_bytes("VmHWM") - before)
    assigned, forward, backward = (b - a for a, b in zip([0, *marks], marks, strict=False))
    return Finding(
        job=job,
        assignment_bytes=assigned,
        forward_bytes=forward,
        backward_bytes=backward,
        peak_bytes=peak,
        wall_seconds=seconds,
    )


def prepare_attention(job: Job) -> Callable[[], Iterator[int]]:
    """Draw one sample's heads; gives what attends, and tells the bytes sent so far after each part."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)

    def draw(num_tokens: int) -> Tensor:
        heads = torch.randn(1, NUM_HEADS, num_tokens, HEAD_DIM, generator=generator)
        return heads.requires_grad_(job.has_backward)

    if job.way in ("clustered", "segment-local"):
        ranks = everyone()
        plan = ClusterPlan(
            ranks=ranks,
            length=job.length,
            num_clusters=NUM_CLUSTERS,
            num_segments=1 if job.way == "clustered" else NUM_SEGMENTS,
        )
        q, k, v = (draw(plan.num_tokens) for _ in range(3))
        planes = torch.randn(NUM_PLANES, HEAD_DIM + 1, generator=torch.Generator().manual_seed(0))

        def attend_clustered() -> Iterator[int]:
            clusters = assign_clusters(
                q, planes, torch.tensor([job.length]), plan, num_iterations=NUM_ITERATIONS, metric="lsh"
            )
            yield ranks.bytes_sent
            out = clustered_attention(q, k, v, clusters, plan)
            yield ranks.bytes_sent
            backward(out, job)
            yield ranks.bytes_sent

        return attend_clustered

    ulysses = {"Ulysses": num_ranks, "ring": 1, "USP": 2 if num_ranks > 1 else 1}[job.way]
    mesh = sequence_mesh(ulysses=ulysses, ring=num_ranks // ulysses)
    dense = SequenceParallel(mesh.get_group("ulysses"), mesh.get_group("ring"), timeout_seconds=TIMEOUT_SECONDS)
    q, k, v = (draw(len(dense.positions(job.length))) for _ in range(3))

    def attend() -> Iterator[int]:
        yield 0
        out = dense.attend(q, k, v, length=job.length)
        yield dense.bytes_sent
        backward(out, job)
        yield dense.bytes_sent

    return attend


def prepare_model(job: Job) -> Callable[[], Iterator[int]]:
    """Draw a recording's features; gives what recognises them."""
    torch.manual_seed(0)
    attention = ClusteredAttentionConfig(num_clusters=100, top_k=32)
    model = CtcTransformer(replace(CTC_TRANSFORMER_SMALL, attention=attention), num_classes=NUM_CLASSES).eval()
    ranks = everyone()
    mesh = sequence_mesh(ulysses=1, ring=dist.get_world_size())
    dense = SequenceParallel(mesh.get_group("ulysses"), mesh.get_group("ring"), timeout_seconds=TIMEOUT_SECONDS)
    part = parallelize(model, ranks, dense)
    frames = job.length * FRAMES_PER_TOKEN
    own = part.shard(torch.randn(1, frames, NUM_MELS))

    def recognise() -> Iterator[int]:
        yield 0
        with torch.inference_mode():
            part(own, torch.tensor([frames]))
        yield ranks.bytes_sent + dense.bytes_sent
        yield ranks.bytes_sent + dense.bytes_sent

    return recognise


def everyone() -> Communicator:
    """Messages among all ranks."""
    mesh = sequence_mesh(ulysses=dist.get_world_size(), ring=1)
    return Communicator(mesh.get_group("ulysses"), timeout_seconds=TIMEOUT_SECONDS)


def backward(out: Tensor, job: Job) -> None:
    """Compute gradients if the job wants them."""
    if job.has_backward:
        out.sum().backward()


def memory_bytes(name: str) -> int:
    """What Linux tells of this process's memory: VmRSS is resident now, VmHWM was at most since the peak was reset."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, name
    return 1024 * int(found[1])


def main() -> None:
    """Do the jobs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    jobs, folder = (Path(argument) for argument in sys.argv[1:])
    found = [measure(Job.model_validate(job)).model_dump() for job in json.loads(jobs.read_text())]
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()  # a rank that leaves early takes messages with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
