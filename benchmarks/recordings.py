"""Long recordings and mixed lengths, sent to a service that serves a speech recogniser.

Three questions: does a recording of all that a speaker said get the words that its utterances get one by one; what do
time and memory of one request grow to with the recording's length, beside the same weights with full attention; how
long do short recordings wait beside a long one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.full_twin import open_full_twin
from benchmarks.joined_speech import join_up_to, read_utterances
from benchmarks.mixed_load import Window, measure_mixed
from benchmarks.recording_lengths import Contestant, Gap, Point, measure_lengths
from benchmarks.speaker_recordings import Speaker, measure_speakers
from benchmarks.speech_service import run_speech_service
from export.build_native import build_native
from service.bundle import MANIFEST, Bundle, open_bundle
from service.tasks.speech_recognition import SPEECH_RECOGNITION

TEST, VALID = "test_dev", "valid"
KERNEL, BODY, FULL = "clustered, kernel", "clustered, body", "full"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to measure; lengths are seconds of recordings, ascending.

    Attributes:
        kernel_lengths, body_lengths: with clustered attention, native kernel and portable body.
        full_lengths: with full attention, as far as memory allows.
        long_length: of the recording beside which short ones are sent.
        num_rounds: of short recordings alone and beside it.
        window_seconds: of each.
    """

    kernel_lengths: tuple[float, ...] = (120.0, 300.0, 600.0, 1800.0)
    body_lengths: tuple[float, ...] = (120.0, 300.0, 600.0, 1800.0)
    full_lengths: tuple[float, ...] = (120.0, 300.0, 600.0)
    long_length: float = 600.0
    num_rounds: int = 3
    window_seconds: float = 10.0


QUICK = Plan(
    kernel_lengths=(60.0, 120.0),
    body_lengths=(60.0,),
    full_lengths=(60.0,),
    long_length=120.0,
    num_rounds=1,
    window_seconds=3.0,
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was measured.

    Attributes:
        model, version: of the bundle.
        stated_error_rate: on test_dev, as the manifest has it; None if it has none.
        speakers: of test_dev.
        points, gaps: lengths that were measured and that were not; joined utterances of valid.
        windows: of mixed load.
    """

    model: str
    version: str
    stated_error_rate: float | None
    speakers: list[Speaker]
    points: list[Point]
    gaps: list[Gap]
    windows: list[Window]


def measure_recordings(bundle: Bundle, data: Path, scratch: Path, plan: Plan) -> Findings:
    """Measure everything.

    Args:
        bundle: a speech recogniser with clustered attention that takes recordings as long as the plan's.
        data: folder of all data sets.
        scratch: folder for the twin and logs.
        plan: how much.
    Raises: FileNotFoundError if the data set is not there; RuntimeError if the native kernel cannot be built or the
        service does not start; NoAnswer if a recording gets none; ValueError as `make_full_twin`.
    """
    test, valid = read_utterances(data, TEST), read_utterances(data, VALID)
    manifest = bundle.manifest
    library = build_native()
    full = open_full_twin(bundle.folder, scratch / f"{manifest.name}-full")
    with run_speech_service(bundle.folder, scratch / "logs" / "recordings.log", library=library) as service:
        speakers = measure_speakers(service, test)
        print("speakers: measured", flush=True)
        long = join_up_to(valid, plan.long_length)
        shorts = [utterance.audio for utterance in test]
        windows = measure_mixed(service, shorts, long.audio, num_rounds=plan.num_rounds, seconds=plan.window_seconds)
        print("mixed load: measured", flush=True)
    points, gaps = measure_lengths(
        make_contestants(bundle.folder, full, library, plan), valid, scratch / "logs" / "recording_lengths.log"
    )
    return Findings(
        model=manifest.name,
        version=manifest.version,
        stated_error_rate=manifest.quality.get(TEST, {}).get("word_error_rate"),
        speakers=speakers,
        points=points,
        gaps=gaps,
        windows=windows,
    )


def make_contestants(bundle: Path, full: Path, library: Path, plan: Plan) -> Sequence[Contestant]:
    """Say what takes turns at each length."""
    return (
        Contestant(name=KERNEL, bundle=bundle, library=library, lengths=plan.kernel_lengths, memory_exponent=1),
        Contestant(name=BODY, bundle=bundle, library=None, lengths=plan.body_lengths, memory_exponent=1),
        Contestant(name=FULL, bundle=full, library=None, lengths=plan.full_lengths, memory_exponent=2),
    )


def find_recogniser(bundles: Path) -> Bundle:
    """Find the speech recogniser to measure.

    Args:
        bundles: a folder of bundles, of which the default one for its task is taken, or the bundle itself.
    Raises: FileNotFoundError if there is none; BundleError if one is damaged.
    """
    if (bundles / MANIFEST).exists():
        return open_bundle(bundles)
    for path in sorted(bundles.glob(f"*/{MANIFEST}")):
        bundle = open_bundle(path.parent)
        if bundle.manifest.task == SPEECH_RECOGNITION.name and bundle.manifest.default:
            return bundle
    raise FileNotFoundError(
        f"{bundles} holds no bundle that is the default for {SPEECH_RECOGNITION.name}; name a folder that does, or a "
        "bundle, with --bundles"
    )
