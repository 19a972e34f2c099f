import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.client import Answer
from benchmarks.quality import measure_quality, render_quality, score
from service.bundle import open_bundle
from tests.benchmarks.recordings import FakeService, make_recording

PICTURES, SPEECH = Path("bundles/paca-vit-micro-cifar10"), Path("bundles/ctc-transformer-small-an4")


def answer(index: int) -> Answer:
    return Answer(200, b"", json.dumps({"predictions": [{"index": index}, {"index": 9}]}).encode())


def test_only_the_first_prediction_counts() -> None:
    assert score([answer(3), answer(1), answer(0), answer(9)], [3, 9, 0, 9]) == 0.75


@pytest.mark.parametrize("lost", [None, Answer(503, b"", b"{}")])
def test_a_picture_without_a_result_is_no_wrong_answer_but_a_failed_measurement(lost: Answer | None) -> None:
    with pytest.raises(ValueError, match="1 of 2 pictures"):
        score([answer(3), lost], [3, 3])


def test_a_recogniser_s_errors_are_counted_over_all_words_of_all_speakers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = [("A B C D", "one"), ("E", "one"), ("F G H", "two")]
    utterances = [make_recording(0.1, text, speaker=name, seed=seed) for seed, (text, name) in enumerate(said)]
    heard = dict(zip((one.audio for one in utterances), ("A B", "E", "F X H"), strict=True))

    @contextmanager
    def run(bundle: Path, log: Path, *, library: Path | None) -> Iterator[FakeService]:
        assert (bundle, library) == (SPEECH, None)
        yield FakeService(heard.__getitem__, os.getpid())

    monkeypatch.setattr(quality, "run_speech_service", run)
    monkeypatch.setattr(quality, "read_utterances", lambda data, split: utterances)
    assert measure_quality(SPEECH, tmp_path) == {"word_error_rate": 3 / 8, "num_examples": 8}


@pytest.mark.parametrize(
    ("bundle", "metric", "unit"), [(PICTURES, "accuracy", "pictures"), (SPEECH, "word_error_rate", "words")]
)
def test_a_result_tells_the_precision_beside_what_the_float32_module_reached(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, metric: str, unit: str
) -> None:
    opened = open_bundle(bundle)
    manifest = opened.manifest.model_copy(update={"precision": "fp16"})
    halved = type(opened)(opened.folder, manifest, opened.sha256)
    monkeypatch.setattr(quality, "open_bundle", lambda folder: halved)
    text = render_quality(bundle, {metric: 0.5, "num_examples": 8})
    assert text.startswith(f"{manifest.name} {manifest.version}, fp16: {metric.replace('_', ' ')} over HTTP **0.5000**")
    assert f"on 8 {unit} of test_dev; its manifest says {manifest.quality['test_dev'][metric]:.4f}." in text


def test_a_task_without_quality_over_http_is_refused_with_those_that_have_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="brain-network-classification; quality is measured of image-classification"):
        measure_quality(Path("bundles/thc-aal116-abide"), tmp_path)
