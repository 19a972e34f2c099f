"""Recordings of minutes to an hour, each in one request, by the ordinary program and by ranks that share them.

Three questions: is the transcript the same; what does each rank hold; does an hour go through. Ranks that share one
core show memory and traffic, not speed. Every cell is kept once it is measured, so that an interrupted run goes on.
"""

import http.client
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.client import Address
from benchmarks.joined_speech import Recording, join_up_to, read_utterances
from benchmarks.machine import read_process_seconds
from benchmarks.speech_service import read_memory, reset_peak, run_speech_service
from export.build_native import build_native
from service.bundle import Bundle
from training.error_rate import count_errors

MB = 1e6
_SAMPLE = re.compile(r"^inference_rank_(sent_bytes|waiting_seconds)_total\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        num_ranks: length in seconds → how many ranks share a recording of it; 0 is the ordinary program.
    """

    num_ranks: dict[float, tuple[int, ...]]


FULL = Plan(num_ranks={600.0: (0, 1, 2, 4), 3600.0: (4,)})
QUICK = Plan(num_ranks={300.0: (0, 2)})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One recording, sent once.

    Attributes:
        bundle_sha256: of the bundle that was served.
        recording_seconds: its length.
        num_ranks: 0 is the ordinary program.
        text: its transcript.
        seconds: from the first byte sent to the last one received.
        run_seconds: of them, in the program or the ranks.
        cpu_seconds: of all processes.
        service_peak_bytes: most that the service's own process held at once, resident.
        rank_peak_bytes: of each rank, the same.
        sent_bytes: among ranks, all together.
        waiting_seconds: of ranks for each other's messages, all together.
    """

    bundle_sha256: str
    recording_seconds: float
    num_ranks: int
    text: str
    seconds: float
    run_seconds: float
    cpu_seconds: float
    service_peak_bytes: int
    rank_peak_bytes: tuple[int, ...]
    sent_bytes: float
    waiting_seconds: float


def measure_long_recordings(bundle: Bundle, data: Path, work: Path, plan: Plan) -> list[Cell]:
    """Send joined utterances of valid, or read what an earlier run found.

    Args:
        bundle: of a speech recogniser that takes recordings of the plan's lengths and names ranks.
        data: folder of all data sets.
        work: folder for what was measured, and logs.
        plan: what to measure.
    Raises: FileNotFoundError if the data set is not there; RuntimeError if the service does not start; NoAnswer.
    """
    utterances = read_utterances(data, "valid")
    work.mkdir(parents=True, exist_ok=True)
    cells = []
    for seconds, numbers in plan.num_ranks.items():
        recording: Recording | None = None
        for num_ranks in numbers:
            path = work / f"{seconds:g}-seconds-{num_ranks}-ranks.json"
            cell = _read(path)
            if cell is None or cell.bundle_sha256 != bundle.sha256:
                recording = recording or join_up_to(utterances, seconds)
                cell = measure_cell(bundle, recording, work / "log", num_ranks=num_ranks)
                path.write_text(json.dumps(asdict(cell)))
            print(f"{seconds:g} s, {num_ranks} ranks: {cell.seconds:.1f} s", flush=True)
            cells.append(cell)
    return cells


def measure_cell(bundle: Bundle, recording: Recording, log: Path, *, num_ranks: int) -> Cell:
    """Send one recording to a service of its own.

    Raises: RuntimeError if it does not start; NoAnswer.
    """
    with run_speech_service(bundle.folder, log, library=build_native(), num_ranks=num_ranks) as service:
        ranks = list_children(service.process_id)
        everyone = [service.process_id, *ranks]
        for process_id in everyone:
            reset_peak(process_id)
        before = sum(map(read_process_seconds, everyone)), _read_communication(service.address)
        (transcript,) = service.transcribe([recording.audio])
        after = sum(map(read_process_seconds, everyone)), _read_communication(service.address)
        peaks = [read_memory(process_id).peak for process_id in everyone]
    spent = {name: after[1].get(name, 0) - before[1].get(name, 0) for name in ("sent_bytes", "waiting_seconds")}
    return Cell(
        bundle_sha256=bundle.sha256,
        recording_seconds=recording.seconds,
        num_ranks=num_ranks,
        text=transcript.text,
        seconds=transcript.seconds,
        run_seconds=transcript.stages["run"],
        cpu_seconds=after[0] - before[0],
        service_peak_bytes=peaks[0],
        rank_peak_bytes=tuple(peaks[1:]),
        **spent,
    )


def list_children(process_id: int) -> list[int]:
    """Find the processes that a process started, whichever of its threads did."""
    return [
        int(child)
        for thread in Path(f"/proc/{process_id}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def render_long_recordings(cells: Sequence[Cell], name: str) -> str:
    """Render a table; each transcript is compared with the first one of its recording."""
    first = {cell.recording_seconds: cell for cell in reversed(cells)}
    rows = "\n".join(_render(cell, first[cell.recording_seconds]) for cell in cells)
    return f"""{name} over HTTP; recordings are joined utterances of AN4's valid. No ranks is the ordinary program with
the native kernel; ranks run torch. Peaks are resident memory while the recording was answered. Words that differ: from
the first row of the same recording.

| recording, s | ranks | words | words that differ | seconds | of them run | CPU-s, all processes | \
peak of the service, MB | peak of the largest rank, MB | sent among ranks, MB | a rank's wait for messages, s |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}"""


def _render(cell: Cell, first: Cell) -> str:
    words = cell.text.split()
    num_different = count_errors(first.text.split(), words).num_errors if cell.text != first.text else 0
    columns = [
        f"{cell.recording_seconds:.0f}",
        str(cell.num_ranks or "none"),
        str(len(words)),
        str(num_different),
        f"{cell.seconds:.1f}",
        f"{cell.run_seconds:.1f}",
        f"{cell.cpu_seconds:.1f}",
        f"{cell.service_peak_bytes / MB:.0f}",
    ]
    if cell.num_ranks:
        waiting = cell.waiting_seconds / cell.num_ranks
        columns += [f"{max(cell.rank_peak_bytes) / MB:.0f}", f"{cell.sent_bytes / MB:.1f}", f"{waiting:.1f}"]
    return "| " + " | ".join(columns) + " |" + " |" * (11 - len(columns))


def _read_communication(address: Address) -> dict[str, float]:
    connection = http.client.HTTPConnection(*address, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    return {name: float(value) for name, value in _SAMPLE.findall(text)}


def _read(path: Path) -> Cell | None:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return Cell(**fields | {"rank_peak_bytes": tuple(fields["rank_peak_bytes"])})
