"""Quality of a bundle as its users get it: every example of a test split is sent to the running service.

The model card's figures come from the trained module; these come over HTTP, from the same files.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.client import Answer
from benchmarks.contestants import run_ours
from benchmarks.load import exchange
from service.bundle import open_bundle

TEST_FILE = Path("../shared/data/image_classification/cifar10_test_dev.parquet")
NUM_IN_FLIGHT = 16
TIMEOUT_SECONDS = 600.0


def measure_quality(bundle: Path, scratch: Path) -> dict[str, float]:
    """Send every picture of test_dev to a service that serves the bundle.

    Args:
        bundle: its folder.
        scratch: folder for the log.
    Returns: `accuracy` and `num_examples`.
    Raises: FileNotFoundError if the data set is not there; ValueError if a picture got no answer.
    """
    table = pq.read_table(TEST_FILE, columns=["image", "label"])
    pictures, labels = table["image"].to_pylist(), table["label"].to_pylist()
    with run_ours(bundle, scratch, pictures[0]) as server:
        requests = [server.build_request(picture) for picture in pictures]
        answers = exchange(server.address, requests, num_connections=NUM_IN_FLIGHT, timeout_seconds=TIMEOUT_SECONDS)
    return {"accuracy": score(answers, labels), "num_examples": len(labels)}


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
    """Write what was found beside what the manifest says."""
    manifest = open_bundle(bundle).manifest
    return (
        f"{manifest.name} {manifest.version}: top-1 accuracy over HTTP **{found['accuracy']:.4f}** on "
        f"{found['num_examples']:.0f} pictures of test_dev; its manifest says "
        f"{manifest.quality['test_dev']['accuracy']:.4f}."
    )
