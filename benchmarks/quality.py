"""Quality of a bundle as its users get it: every example of a test split is sent to the running service.

The model card's figures come from the trained module, in float32; these come over HTTP, from the same files, and show
what a program in float16 costs.
Deliberately absent: segmenters and classifiers of brain networks, whose figures training alone measures.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.client import Answer
from benchmarks.contestants import run_ours
from benchmarks.joined_speech import read_utterances
from benchmarks.load import exchange
from benchmarks.speaker_recordings import measure_speakers
from benchmarks.speech_service import run_speech_service
from service.bundle import open_bundle

DATA = Path("../shared/data")
TEST_FILE = DATA / "image_classification/cifar10_test_dev.parquet"
SPLIT = "test_dev"
NUM_IN_FLIGHT = 16
TIMEOUT_SECONDS = 600.0
UNITS = {"accuracy": "pictures", "word_error_rate": "words"}  # metric of a manifest → what it counts


def measure_quality(bundle: Path, scratch: Path) -> dict[str, float]:
    """Send every example of test_dev to a service that serves the bundle.

    Args:
        bundle: its folder.
        scratch: folder for the log.
    Returns: a metric of `UNITS`, and `num_examples`, how many of its unit there were.
    Raises: FileNotFoundError if the data set is not there; ValueError if an example got no answer, or the bundle is of
        a task that has no quality over HTTP.
    """
    task = open_bundle(bundle).manifest.task
    if task not in MEASURES:
        raise ValueError(f"{bundle} is for {task}; quality is measured of {', '.join(MEASURES)}; name such a bundle")
    return MEASURES[task](bundle, scratch)


def _measure_pictures(bundle: Path, scratch: Path) -> dict[str, float]:
    table = pq.read_table(TEST_FILE, columns=["image", "label"])
    pictures, labels = table["image"].to_pylist(), table["label"].to_pylist()
    with run_ours(bundle, scratch, pictures[0]) as server:
        requests = [server.build_request(picture) for picture in pictures]
        answers = exchange(server.address, requests, num_connections=NUM_IN_FLIGHT, timeout_seconds=TIMEOUT_SECONDS)
    return {"accuracy": score(answers, labels), "num_examples": len(labels)}


def _measure_recordings(bundle: Path, scratch: Path) -> dict[str, float]:
    utterances = read_utterances(DATA, SPLIT)
    with run_speech_service(bundle, scratch / "quality.log", library=None) as service:
        speakers = measure_speakers(service, utterances, min_seconds=math.inf)  # one by one
    num_words = sum(speaker.num_words for speaker in speakers)
    return {
        "word_error_rate": sum(speaker.errors_alone for speaker in speakers) / num_words,
        "num_examples": num_words,
    }


MEASURES: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "image-classification": _measure_pictures,
    "speech-recognition": _measure_recordings,
}


def score(answers: Sequence[Answer | None], labels: Sequence[int]) -> float:
    """Share of the answers whose first prediction is right.

    Raises: ValueError if there is an answer other than 200, or none.
    """
    if lost := [answer.status if answer else 0 for answer in answers if answer is None or answer.status != 200]:
        raise ValueError(f"{len(lost)} of {len(answers)} pictures got no result; the first of them status {lost[0]}")
    found = [json.loads(answer.body)["predictions"][0]["index"] for answer in answers if answer]
    num_right = sum(bool(index == label) for index, label in zip(found, labels, strict=True))
    return num_right / len(labels)


def render_quality(bundle: Path, found: dict[str, float]) -> str:
    """Write what was found beside what the manifest says, which is of the module in float32."""
    manifest = open_bundle(bundle).manifest
    (metric,) = found.keys() & UNITS.keys()
    return (
        f"{manifest.name} {manifest.version}, {manifest.precision}: {metric.replace('_', ' ')} over HTTP "
        f"**{found[metric]:.4f}** on {found['num_examples']:.0f} {UNITS[metric]} of {SPLIT}; its manifest says "
        f"{manifest.quality[SPLIT][metric]:.4f}."
    )
