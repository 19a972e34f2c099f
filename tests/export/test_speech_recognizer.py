import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from export import speech_recognizer
from export.bundles import PROGRAM
from export.parity import MAX_RELATIVE_ERROR
from export.plan import EXPORT_BATCH, Plan
from export.planners import make_plan
from export.recordings import RECORDING, SAMPLES, cut_recordings, read_recording
from export.source import read_source
from export.speech_recognizer import (
    BUCKET_RATIO,
    EXPORT_FRAMES,
    MAX_SHARE_OFF,
    SpeechRecognizerProgram,
    choose_golden,
    count_near_ties,
    make_buckets,
)
from service.bundle import Normalisation, open_bundle
from service.collate import pad
from service.metrics import Metrics
from service.opening import open_endpoint
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.settings import Settings
from service.tasks.speech_recognition import SPEECH_RECOGNITION, SpeechRecognitionOptions, SpeechRecognitionSpec
from tests.export.tiny_recogniser import CLUSTERED, CONFIG, FULL, FULL_BELOW, make_recogniser, make_speech_source

SPEC = SpeechRecognitionSpec.model_validate(make_speech_source(CLUSTERED).spec)
NORMALISATION = Normalisation(mean=(-6.1,), std=(3.7,))
NUM_CLUSTERS = 8


@pytest.fixture(scope="module")
def plan(speech_bundle: Path) -> Plan:
    return make_plan(*read_source(speech_bundle))


@pytest.fixture(scope="module")
def runtime(speech_bundle: Path) -> Iterator[OnnxRuntime]:
    opened = open_onnx(speech_bundle / PROGRAM, device="cpu")
    yield opened
    opened.close()


# The module


@pytest.mark.parametrize("num_bands", [1, CONFIG.num_mels])
@torch.inference_mode()
def test_features_are_normalised_inside(num_bands: int) -> None:
    rng = np.random.default_rng(0)
    mean, std = rng.uniform(-8, -4, num_bands), rng.uniform(2, 4, num_bands)
    batch = pad(cut_recordings(SPEC, [0.9]))
    normalised = torch.from_numpy(((batch["features"] - mean) / std).astype(np.float32))
    features, lengths = (torch.from_numpy(batch[name]) for name in ("features", "lengths"))
    program = SpeechRecognizerProgram(make_recogniser(CLUSTERED), Normalisation(mean=tuple(mean), std=tuple(std)))
    expected, _ = make_recogniser(CLUSTERED)(normalised, lengths)
    torch.testing.assert_close(program(features, lengths)[0], expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_every_number_of_the_outputs_means_something() -> None:
    batch = pad(cut_recordings(SPEC, [0.9, 5.2]))
    program = SpeechRecognizerProgram(make_recogniser(CLUSTERED), NORMALISATION)
    log_probs, clusters = program(*(torch.from_numpy(batch[name]) for name in ("features", "lengths")))
    num_tokens = -(-int(batch["lengths"][0]) // 2)
    assert clusters.dtype == torch.int32
    assert clusters.shape == (2, CONFIG.num_layers, CONFIG.num_heads, log_probs.shape[1])
    assert (log_probs[0, num_tokens:] == 0).all()
    assert (clusters[0, :, :, num_tokens:] == NUM_CLUSTERS).all()
    sums = log_probs.exp().sum(dim=-1)
    torch.testing.assert_close(sums[0, :num_tokens], torch.ones(num_tokens), atol=1e-5, rtol=0)
    assert (log_probs[1] < 0).all()
    assert (clusters[1] < NUM_CLUSTERS).all()


def test_a_normalisation_of_another_number_of_bands_is_refused() -> None:
    with pytest.raises(ValueError, match="normalisation has 3 numbers for 20 bands"):
        SpeechRecognizerProgram(make_recogniser(CLUSTERED), Normalisation(mean=(0, 0, 0), std=(1, 1, 1)))


# The program


def test_a_recording_gets_the_same_alone_and_padded_in_a_batch(runtime: OnnxRuntime) -> None:
    samples = cut_recordings(SPEC, [0.8, 9.0, 3.3, 4.1])
    together = runtime.run(pad(samples), ("log_probs", "clusters"))
    for row, sample in enumerate(samples):
        alone = runtime.run(pad([sample]), ("log_probs", "clusters"))
        num_tokens = -(-sample.length // 2)
        found = together["log_probs"][row, :num_tokens]
        np.testing.assert_allclose(found, alone["log_probs"][0], atol=1e-5, rtol=0)  # sums in another order
        np.testing.assert_array_equal(together["clusters"][row, :, :, :num_tokens], alone["clusters"][0])


def test_parity_was_measured_where_the_export_was_not_made(speech_bundle: Path, plan: Plan) -> None:
    parity = open_bundle(speech_bundle).manifest.parity
    assert parity.batch_sizes == (1, 3, 8)
    assert EXPORT_BATCH not in parity.batch_sizes
    assert EXPORT_FRAMES not in {batch["features"].shape[1] for batch in plan.parity_batches}
    assert parity.max_relative_error.keys() == parity.share_of_rows_off.keys() == {"log_probs", "clusters"}
    assert all(error <= MAX_RELATIVE_ERROR for error in parity.max_relative_error.values())
    assert all(0 <= share <= MAX_SHARE_OFF for share in parity.share_of_rows_off.values())
    assert RECORDING in parity.inputs


def test_parity_covers_full_and_clustered_attention(plan: Plan) -> None:
    tokens = [-(-int(length) // 2) for batch in plan.parity_batches for length in batch["lengths"]]
    assert min(tokens) < FULL_BELOW < max(tokens)
    assert len(set(tokens)) > 10


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("bundle", "repeats"),
    [("speech_bundle", 1), ("speech_bundle", 2), ("full_speech_bundle", 1)],
    ids=["short", "clustered", "full"],
)
async def test_the_service_answers_as_the_task_does_with_the_module(
    bundle: str, repeats: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(bundle)
    opened = open_bundle(folder)
    spec, plan = SpeechRecognitionSpec.model_validate(opened.manifest.spec), make_plan(*read_source(folder))
    explain = "clusters" if spec.has_clusters else "none"
    options = SpeechRecognitionOptions(timestamps="word", explain=explain)
    body = repeat_recording(repeats)
    sample = SPEECH_RECOGNITION.decode(body, "audio/flac", spec)
    outputs = {name: rows[0] for name, rows in plan.run(pad([sample])).items()}
    expected = SPEECH_RECOGNITION.postprocess(
        outputs, sample, spec, options, model=opened.manifest.name, version=opened.manifest.version
    )
    with ThreadPoolExecutor(1) as pool:
        endpoint = open_endpoint(opened, Settings(cache=tmp_path, device="cpu"), Metrics(), pool)
        endpoint.start(1)
        answer = json.loads((await endpoint.predict(body, "audio/flac", options, timeout_seconds=30)).body)
        endpoint.close()
    assert answer["text"] == expected.text
    assert answer["duration_seconds"] == pytest.approx(3.1 * repeats)
    assert [word["word"] for word in answer["words"]] == [word.word for word in expected.words or []]
    if expected.clusters is not None:
        assert answer["clusters"] == expected.model_dump(mode="json")["clusters"]
        assert len(answer["clusters"]["layers"]) == (CONFIG.num_layers if repeats > 1 else 0)


def repeat_recording(repeats: int) -> bytes:
    samples, rate = soundfile.read(SAMPLES / RECORDING, dtype="float32")
    file = io.BytesIO()
    soundfile.write(file, np.tile(samples, repeats), rate, format="FLAC")
    return file.getvalue()


# The manifest


def test_a_recogniser_with_full_attention_tells_that_it_has_no_clusters(full_speech_bundle: Path) -> None:
    manifest = open_bundle(full_speech_bundle).manifest
    assert [tensor.name for tensor in manifest.outputs] == ["log_probs"]
    assert manifest.spec["has_clusters"] is False
    assert manifest.golden.max_share_off == 0
    assert manifest.parity.share_of_rows_off == {}


def test_the_manifest_tells_what_goes_in_and_out(speech_bundle: Path, plan: Plan) -> None:
    manifest = open_bundle(speech_bundle).manifest
    assert [(t.name, t.dtype, t.shape) for t in manifest.inputs] == [
        ("features", "float32", ("batch", "frames", 20)),
        ("lengths", "int64", ("batch",)),
    ]
    assert [(t.name, t.dtype, t.shape) for t in manifest.outputs] == [
        ("log_probs", "float32", ("batch", "tokens", 5)),
        ("clusters", "int32", ("batch", 2, 2, "tokens")),
    ]
    assert manifest.golden.max_share_off == MAX_SHARE_OFF
    assert manifest.length_buckets == make_buckets(SPEC)
    assert plan.spec == manifest.spec, "a bundle that is made again says the same"


def test_buckets_grow_evenly_up_to_the_longest_recording(plan: Plan) -> None:
    buckets = np.array(plan.length_buckets)
    ratios = buckets[1:] / buckets[:-1]
    assert buckets[0] == 148  # frames of 1.5 s
    assert buckets[-1] == SPEC.max_frames
    assert ratios.max() <= BUCKET_RATIO + 0.01
    assert ratios.max() - ratios.min() < 0.02
    assert plan.short_length in plan.length_buckets
    assert abs(plan.short_length / 2998 - 1) < 0.2  # frames of 30 s


def test_a_recogniser_of_long_recordings_names_ranks_from_a_bucket_on() -> None:
    plan = make_plan(make_speech_source(CLUSTERED, max_seconds=900.0), make_recogniser(CLUSTERED))
    assert plan.long_length in plan.length_buckets[:-1]
    assert abs(plan.long_length / 29998 - 1) < 0.2  # frames of 300 s


def test_a_bundle_names_ranks_only_if_a_recording_can_be_long(speech_bundle: Path) -> None:
    manifest = open_bundle(speech_bundle).manifest
    assert manifest.long_length is None  # its longest recording has 120 s
    assert manifest.programs.keys() == {"onnx"}


@pytest.mark.parametrize("seconds", [1.0, 1.5, 20.0])
def test_where_all_recordings_are_short_none_is_long(seconds: float) -> None:
    source = make_speech_source(CLUSTERED, max_seconds=seconds)
    spec = SpeechRecognitionSpec.model_validate(source.spec)
    assert make_buckets(spec)[-1] == spec.max_frames
    assert (len(make_buckets(spec)) == 1) == (seconds <= 1.5)


@pytest.mark.parametrize("change", [{"subsampling": 4}, {"features": {"num_mels": 24}}])
def test_a_spec_of_another_model_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="num_mels and subsampling are"):
        make_plan(make_speech_source(CLUSTERED, **change), make_recogniser(CLUSTERED))


# Golden recordings


def test_golden_recordings_need_both_kinds_of_attention(plan: Plan) -> None:
    short, long = plan.golden["lengths"]
    recording = read_recording(SPEC)
    np.testing.assert_array_equal(plan.golden["features"][0, :short], recording.inputs["features"])
    assert short == recording.length < 2 * FULL_BELOW <= long


def test_of_several_golden_recordings_that_with_the_fewest_near_ties_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    program = SpeechRecognizerProgram(make_recogniser(CLUSTERED), NORMALISATION).eval()
    counts = iter([3, 5, 1, 4])
    seen = []

    def count(_: object, batch: dict[str, np.ndarray]) -> int:
        seen.append(batch)
        return next(counts)

    monkeypatch.setattr(speech_recognizer, "count_near_ties", count)
    assert choose_golden(program, SPEC) is seen[2]
    assert len({batch["features"].tobytes() for batch in seen}) == 4


def test_near_ties_are_those_that_a_small_error_breaks(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    program = plan.program
    assert isinstance(program, SpeechRecognizerProgram)
    few = count_near_ties(program, plan.golden)
    monkeypatch.setattr(speech_recognizer, "NEAR", 0.01)
    many = count_near_ties(program, plan.golden)
    monkeypatch.setattr(speech_recognizer, "NEAR", 0.0)
    assert count_near_ties(program, plan.golden) == 0 <= few < many


def test_without_clusters_no_tie_decides() -> None:
    source = make_speech_source(FULL)
    golden = make_plan(source, make_recogniser(FULL)).golden
    assert len(golden["lengths"]) == 2
