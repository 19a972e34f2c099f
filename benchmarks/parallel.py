"""What sequence parallelism sends and holds: bytes of each way of spreading attention, peak memory of a rank.

Groups of ranks are started by torchrun on this machine, with gloo, and count their own bytes; every count is held
against the formula of `models.parallel.costs`. Lengths that would take too long are worked out by the formulas alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

from benchmarks.parallel_worker import HEAD_DIM, NUM_CLUSTERS, NUM_HEADS, Finding, Job, Way
from models.parallel.costs import (
    CLUSTERED_FACTS,
    DENSE_FACTS,
    Sent,
    Workload,
    agreement_bytes,
    assignment_bytes,
    clustered_bytes,
    segment_clustered_bytes,
    usp_bytes,
)

NUM_RANKS = 4  # of the table of bytes
SIZES = (8192, 16384, 32768, 65536, 90000)
WAYS: tuple[Way, ...] = ("Ulysses", "ring", "USP", "clustered", "segment-local")
LIMIT_SECONDS = 600.0  # for one group


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure.

    Attributes:
        counted: what four ranks run to count their bytes.
        held: what groups of all sizes run for their peak memory.
        groups: numbers of ranks.
    """

    counted: tuple[Job, ...] = (
        *(Job(way=way, length=2048, has_backward=True) for way in WAYS),
        *(Job(way=way, length=8192) for way in WAYS[:3]),
        *(Job(way=way, length=length) for way in WAYS[3:] for length in (8192, 32768)),
    )
    held: tuple[Job, ...] = (
        Job(way="Ulysses", length=4096),
        Job(way="clustered", length=16384),
        Job(way="recogniser", length=8000),
    )
    groups: tuple[int, ...] = (1, 2, NUM_RANKS)


QUICK = Plan(
    counted=tuple(Job(way=way, length=512, has_backward=True) for way in WAYS),
    held=(Job(way="recogniser", length=1000),),
    groups=(1, NUM_RANKS),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What groups found.

    Attributes:
        counted: the first rank's, whose bytes are those of all.
        held: by number of ranks, for each job the rank that held most.
    """

    counted: list[Finding]
    held: dict[int, list[Finding]]


def measure_parallel(plan: Plan) -> Measured:
    """Run all groups.

    Raises: AssertionError if a count is not that of its formula; RuntimeError if a rank fails.
    """
    held, counted = {}, []
    for num_ranks in plan.groups:
        jobs = [*plan.held, *(plan.counted if num_ranks == NUM_RANKS else ())]
        by_rank = run_group(jobs, num_ranks)
        by_job = list(zip(*by_rank, strict=True))
        held[num_ranks] = [max(found, key=lambda one: one.peak_bytes) for found in by_job[: len(plan.held)]]
        for found in by_job:
            for one in found:
                assert_counted(one, num_ranks)
        counted += by_rank[0][len(plan.held) :]
        print(f"{num_ranks} ranks measured", flush=True)
    return Measured(counted=counted, held=held)


def run_group(jobs: Sequence[Job], num_ranks: int) -> list[list[Finding]]:
    """Run jobs on a group of ranks: what each rank found.

    Raises: RuntimeError if one fails.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "jobs.json").write_text(json.dumps([job.model_dump() for job in jobs]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command += ["-m", "benchmarks.parallel_worker", str(path / "jobs.json"), folder]
        # Messages stay on this machine: gloo would look for its address by its name, which may lead elsewhere.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
        if ended.returncode:
            raise RuntimeError(f"ranks ended with status {ended.returncode}:\n{ended.stderr[-4000:]}")
        files = [path / f"rank{rank}.json" for rank in range(num_ranks)]
        return [[Finding.model_validate(one) for one in json.loads(file.read_text())] for file in files]


def formula(way: Way, length: int, num_ranks: int) -> Sent:
    """Bytes that a rank sends for one call of attention, its clusters given."""
    work = Workload(length=length, num_heads=NUM_HEADS, head_dim=HEAD_DIM)
    if way == "clustered":
        return clustered_bytes(work, num_ranks=num_ranks, num_clusters=NUM_CLUSTERS)
    if way == "segment-local":
        return segment_clustered_bytes(work, num_ranks=num_ranks, num_clusters=NUM_CLUSTERS)
    ulysses = {"Ulysses": num_ranks, "ring": 1, "USP": 2}[way]
    return usp_bytes(work, ulysses=ulysses, ring=num_ranks // ulysses)


def assignment(length: int, num_ranks: int) -> int:
    """Bytes that a rank sends to find global clusters."""
    work = Workload(length=length, num_heads=NUM_HEADS, head_dim=HEAD_DIM)
    return assignment_bytes(work, num_ranks=num_ranks, num_clusters=NUM_CLUSTERS)


def assert_counted(found: Finding, num_ranks: int) -> None:
    """Hold a rank's counts against the formulas, agreement on shapes included.

    Raises: AssertionError.
    """
    job = found.job
    if job.way == "recogniser":
        return
    sent = formula(job.way, job.length, num_ranks)
    is_clustered = job.way in ("clustered", "segment-local")
    ulysses = num_ranks if is_clustered or job.way == "Ulysses" else 2 if job.way == "USP" else 1
    facts = CLUSTERED_FACTS if is_clustered else DENSE_FACTS
    agreed = agreement_bytes(facts, ulysses=ulysses, ring=num_ranks // ulysses)
    assigned = agreed if is_clustered else 0
    assigned += assignment(job.length, num_ranks) if job.way == "clustered" else 0
    expected = (assigned, sent.forward + agreed, sent.backward * job.has_backward)
    counted = (found.assignment_bytes, found.forward_bytes, found.backward_bytes)
    assert counted == expected, f"{job} on {num_ranks} ranks sent {counted}; the formulas say {expected}"


def render_parallel(measured: Measured) -> str:
    """Write the tables as Markdown."""
    sizes = sorted({*SIZES, *(one.job.length for one in measured.counted)})
    counted = {(one.job.way, one.job.length, part) for one in measured.counted for part in parts_of(one.job)}
    head = " | ".join(f"N = {size}" for size in sizes)
    lines = [f"| a rank sends, MB | {head} |", "|---" * (len(sizes) + 1) + "|"]
    for part in ("forward", "backward"):
        for way in WAYS:
            cells = []
            for size in sizes:
                sent = formula(way, size, NUM_RANKS)
                mark = "*" if (way, size, part) in counted else ""
                cells.append(f"{(sent.forward if part == 'forward' else sent.backward) / 1e6:.3f}{mark}")
            lines.append(f"| {way}, {part} | {' | '.join(cells)} |")
    ids = " | ".join(
        f"{assignment(size, NUM_RANKS) / 1e6:.3f}{'*' if ('clustered', size, 'forward') in counted else ''}"
        for size in sizes
    )
    ratios = " | ".join(
        f"{formula('clustered', size, NUM_RANKS).forward / formula('Ulysses', size, NUM_RANKS).forward:.4f}"
        for size in sizes
    )
    lines += [f"| finding global clusters | {ids} |", f"| clustered / Ulysses, forward | {ratios} |"]
    return f"""P = {NUM_RANKS}, H = {NUM_HEADS}, D = {HEAD_DIM}, C = {NUM_CLUSTERS}, batch 1, float32. Payload of \
attention that leaves one rank; ranks also agree on shapes, less than 1 kB a call. * counted by the module while four \
processes ran (gloo), on every rank equal to the formula to the byte; the others by the formula alone. Segment-local \
clusters are found without a message.

{chr(10).join(lines)}

## Memory

Peak of the rank that holds most, beyond what its process has with its part of the inputs, MB; in brackets the share \
of P = 1. One thread a rank; forward only.

{_memory_table(measured.held)}"""


def parts_of(job: Job) -> tuple[str, ...]:
    """Passes that a job counts."""
    return ("forward", "backward") if job.has_backward else ("forward",)


def _memory_table(held: dict[int, list[Finding]]) -> str:
    groups = sorted(held)
    lines = ["| | " + " | ".join(f"P = {group}" for group in groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for i, one in enumerate(held[groups[0]]):
        peaks = [held[group][i].peak_bytes for group in groups]
        cells = " | ".join(f"{peak / 1e6:.0f} ({peak / peaks[0]:.2f})" for peak in peaks)
        lines.append(f"| {_name(one.job)} | {cells} |")
    return "\n".join(lines)


def plot_parallel(measured: Measured, path: Path) -> None:
    """Draw bytes against the length and memory against the number of ranks, as PNG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bytes_axis, memory_axis = figure.subplots(1, 2)
    for way in WAYS:
        sent = [formula(way, size, NUM_RANKS).forward / 1e6 for size in SIZES]
        bytes_axis.plot(SIZES, sent, marker="o", label=way)
    assigned = [assignment(size, NUM_RANKS) / 1e6 for size in SIZES]
    bytes_axis.plot(SIZES, assigned, "--", marker="o", label="finding global clusters")
    bytes_axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=f"MB a rank sends, forward, {NUM_RANKS} ranks")
    bytes_axis.set_xticks(SIZES, [f"{size / 1000:.0f}k" for size in SIZES])
    groups = sorted(measured.held)
    for i, one in enumerate(measured.held[groups[0]]):
        peaks = [measured.held[group][i].peak_bytes / 1e6 for group in groups]
        memory_axis.plot(groups, peaks, marker="o", label=_name(one.job))
    memory_axis.set(xlabel="ranks", ylabel="peak memory of a rank, MB", ylim=(0, None))
    memory_axis.set_xticks(groups, [str(group) for group in groups])
    for axis in (bytes_axis, memory_axis):
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _name(job: Job) -> str:
    what = "recogniser, clustered" if job.way == "recogniser" else job.way
    return f"{what}, N = {job.length}"
