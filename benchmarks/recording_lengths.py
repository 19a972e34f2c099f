"""One recording of some length in one request: its time, the service's memory, its errors; full attention beside.

Each measurement has a service process of its own, so that no memory is left from another; contestants take turns at
each length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.joined_speech import Recording, join_up_to
from benchmarks.machine import read_process_seconds
from benchmarks.speech_service import NoAnswer, SpeechService, read_memory, reset_peak, run_speech_service
from training.error_rate import count_errors

MEMORY_SHARE = 0.8  # of what is available; beyond it the system would begin to end processes


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What is measured, and how far.

    Attributes:
        name: in the tables.
        bundle: its folder.
        library: of the native kernel; None runs portable bodies.
        lengths: seconds of the recordings, ascending.
        memory_exponent: memory grows with this power of the length; tells whether a length still fits.
    """

    name: str
    bundle: Path
    library: Path | None
    lengths: tuple[float, ...]
    memory_exponent: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One contestant and one recording.

    Attributes:
        contestant: its name.
        length: seconds that were asked for.
        recording_seconds: the recording's real length.
        seconds: from the first byte sent to the answer.
        cpu_seconds: of the service's process meanwhile.
        stages: of the service's work → seconds.
        idle_bytes: resident memory before the request.
        peak_bytes: most resident memory until the answer.
        num_errors, num_words: errors, and words said.
    """

    contestant: str
    length: float
    recording_seconds: float
    seconds: float
    cpu_seconds: float
    stages: dict[str, float]
    idle_bytes: int
    peak_bytes: int
    num_errors: int
    num_words: int

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of the recording."""
        return self.seconds / self.recording_seconds

    @property
    def added_bytes(self) -> int:
        """Memory that the request took."""
        return self.peak_bytes - self.idle_bytes


@dataclass(frozen=True)
class Gap:
    """A length at which a contestant was not measured.

    Attributes:
        contestant: its name.
        length: seconds.
        reason: why not.
    """

    contestant: str
    length: float
    reason: str


def measure_lengths(
    contestants: Sequence[Contestant], utterances: Sequence[Recording], log: Path
) -> tuple[list[Point], list[Gap]]:
    """Measure all contestants, each until a length does not fit.

    Args:
        contestants: in the order in which they take turns.
        utterances: that recordings are joined of.
        log: file for what the services write.
    """
    points: list[Point] = []
    gaps: list[Gap] = []
    for length in sorted({length for one in contestants for length in one.lengths}):
        recording = join_up_to(utterances, length)
        for one in contestants:
            if length not in one.lengths:
                continue
            own = [point for point in points if point.contestant == one.name]
            reason = find_obstacle(own, length, one.memory_exponent, available=read_available_bytes())
            ended = [gap for gap in gaps if gap.contestant == one.name]
            if ended or reason:
                gaps.append(Gap(one.name, length, reason or f"as at {ended[0].length:g} s"))
                continue
            try:
                with run_speech_service(one.bundle, log, library=one.library) as service:
                    points.append(_measure(service, one.name, length, recording, first=utterances[0]))
                print(f"{one.name}, {length:g} s: measured", flush=True)
            except NoAnswer as failure:
                gaps.append(Gap(one.name, length, str(failure)))
    return points, gaps


def find_obstacle(points: Sequence[Point], length: float, memory_exponent: int, *, available: int) -> str | None:
    """Tell why a length would not fit into memory, by what the last shorter one took.

    Args:
        points: of the contestant so far.
        length: seconds.
        memory_exponent: of the contestant.
        available: bytes that processes may still take.
    Returns: None if it fits, or if nothing shorter was measured.
    """
    if not points:
        return None
    last = points[-1]
    needed = last.added_bytes * (length / last.recording_seconds) ** memory_exponent
    if needed <= MEMORY_SHARE * available:
        return None
    return f"would take about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available"


def read_available_bytes() -> int:
    """Read how much memory processes may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _measure(service: SpeechService, name: str, length: float, recording: Recording, *, first: Recording) -> Point:
    service.transcribe([first.audio])  # what is made once is not the recording's
    reset_peak(service.process_id)
    idle, cpu = read_memory(service.process_id).current, read_process_seconds(service.process_id)
    (transcript,) = service.transcribe([recording.audio])
    cpu = read_process_seconds(service.process_id) - cpu
    errors = count_errors(recording.text.split(), transcript.text.split())
    return Point(
        contestant=name,
        length=length,
        recording_seconds=recording.seconds,
        seconds=transcript.seconds,
        cpu_seconds=cpu,
        stages=transcript.stages,
        idle_bytes=idle,
        peak_bytes=read_memory(service.process_id).peak,
        num_errors=errors.num_errors,
        num_words=errors.num_said,
    )
