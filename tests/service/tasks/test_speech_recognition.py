import io
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from pydantic import BaseModel, ValidationError

from service.collate import pad
from service.errors import InvalidInput, ModelFailed
from service.sample import Arrays, Sample
from service.tasks import TASKS
from service.tasks.log_mel import log_mel
from service.tasks.speech_recognition import (
    SPEECH_RECOGNITION,
    SpeechRecognitionOptions,
    SpeechRecognitionResult,
    SpeechRecognitionSpec,
)

RATE = 16_000
LABELS = ("", " ", "A", "B", "C")
LANGUAGE_MODEL = {
    "words": ["A", "CAB"],
    "unigrams": [-1.0, -1.0, -1.0],
    "backoffs": [0.0, 0.0, 0.0],
    "bigrams": [],
    "unknown": -5.0,
    "unknown_character": -1.0,
    "weight": 1.0,
    "word_bonus": 0.0,
    "is_closed": True,
}


def make_spec(**changes: Any) -> SpeechRecognitionSpec:
    fields = {
        "sample_rate_hz": RATE,
        "features": {"num_mels": 20},
        "labels": LABELS,
        "subsampling": 2,
        "min_seconds": 0.1,
        "max_seconds": 5.0,
        "beam_width": 4,
    }
    return SpeechRecognitionSpec.model_validate({**fields, **changes})


def save(samples: npt.NDArray[np.float32], rate: int = RATE, name: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=name)
    return file.getvalue()


def noise(seconds: float, rate: int = RATE) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32)


def utter(path: str, probability: float = 0.96) -> npt.NDArray[np.float32]:
    """Log probabilities that favour a path, written with `-` for blanks."""
    probabilities = np.full((len(path), len(LABELS)), (1 - probability) / (len(LABELS) - 1))
    for row, character in enumerate(path):
        probabilities[row, LABELS.index("" if character == "-" else character)] = probability
    return np.log(probabilities).astype(np.float32)


def make_sample(num_frames: int) -> Sample:
    return Sample(inputs={}, length=num_frames, context=(num_frames - 1) * 0.01 + 0.025)


def recognise(
    path: str, *, outputs: Arrays | None = None, spec: SpeechRecognitionSpec | None = None, **options: Any
) -> SpeechRecognitionResult:
    return SPEECH_RECOGNITION.postprocess(
        {"log_probs": utter(path), **(outputs or {})},
        make_sample(2 * len(path)),
        spec or make_spec(),
        SpeechRecognitionOptions.model_validate(options),
        model="tiny",
        version="1",
    )


# What goes in


def test_the_task_is_registered_under_its_name() -> None:
    assert TASKS[SPEECH_RECOGNITION.name] is SPEECH_RECOGNITION


def test_a_recording_becomes_its_log_mel_features() -> None:
    spec = make_spec()
    samples = np.round(noise(1.0) * 32768) / np.float32(32768)
    sample = SPEECH_RECOGNITION.decode(save(samples), "audio/wav", spec)
    assert list(sample.inputs) == ["features"]
    expected = log_mel(samples, spec.features, sample_rate_hz=RATE)
    np.testing.assert_array_equal(sample.inputs["features"], expected, strict=True)
    assert (sample.length, sample.context) == (98, 1.0)


def test_the_first_bytes_decide_whatever_media_type_was_named() -> None:
    samples = np.round(noise(0.5) * 32768) / np.float32(32768)
    flac = SPEECH_RECOGNITION.decode(save(samples, name="FLAC"), "audio/mpeg", make_spec())
    wav = SPEECH_RECOGNITION.decode(save(samples), "", make_spec())
    np.testing.assert_array_equal(flac.inputs["features"], wav.inputs["features"], strict=True)


@pytest.mark.parametrize("rate", [8_000, 44_100, 192_000])
def test_the_shortest_and_the_longest_recording_fit_at_every_rate(rate: int) -> None:
    spec = make_spec(min_seconds=0.035, max_seconds=0.5)
    shortest = SPEECH_RECOGNITION.decode(save(noise(0.035, rate), rate), "", spec)
    assert shortest.length >= 1
    longest = SPEECH_RECOGNITION.decode(save(noise(0.5, rate), rate), "", spec)
    assert longest.length <= spec.max_frames == 48


def test_silence_gets_an_answer() -> None:
    sample = SPEECH_RECOGNITION.decode(save(np.zeros(RATE, np.float32)), "", make_spec())
    assert np.isfinite(sample.inputs["features"]).all()
    outputs = {"log_probs": utter("-" * 49)}
    options = SpeechRecognitionOptions(timestamps="word")
    result = SPEECH_RECOGNITION.postprocess(outputs, sample, make_spec(), options, model="tiny", version="1")
    assert json.loads(result.model_dump_json(exclude_none=True)) == {
        "model": "tiny", "version": "1", "text": "", "duration_seconds": 1.0, "words": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    "body", [b"", b"this is text", save(noise(0.01)), save(noise(6.0)), save(noise(1.0), name="FLAC")[:9000]]
)
def test_what_cannot_be_used_is_invalid_input(body: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        SPEECH_RECOGNITION.decode(body, "audio/wav", make_spec())
    assert str(caught.value).count("; ") == 2


# What comes out


def test_an_answer_has_text_and_duration_alone_by_default() -> None:
    result = recognise("-CAAB--  A-")
    assert result.model_dump(exclude_none=True) == {
        "model": "tiny", "version": "1", "text": "CAB A", "duration_seconds": 0.235,
    }  # fmt: skip


def test_words_come_with_times_and_scores() -> None:
    words = recognise("-CAAB--  A-", timestamps="word").words
    assert words is not None
    # Rows of 20 ms; the first begins 7.5 ms after the recording, half a window before less half a hop.
    assert [word.model_dump() for word in words] == [
        {"word": "CAB", "start_seconds": 0.028, "end_seconds": 0.108, "score": pytest.approx(0.96)},
        {"word": "A", "start_seconds": 0.188, "end_seconds": 0.208, "score": pytest.approx(0.96)},
    ]


def test_no_word_ends_after_the_recording() -> None:
    sample = Sample(inputs={}, length=1, context=0.025)
    result = SPEECH_RECOGNITION.postprocess(
        {"log_probs": utter("A")},
        sample,
        make_spec(),
        SpeechRecognitionOptions(timestamps="word"),
        model="m",
        version="1",
    )
    assert result.words is not None
    assert result.words[0].end_seconds == 0.025


@pytest.mark.parametrize(("num_frames", "num_rows"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_padding_is_cut_off_before_anything_is_read(num_frames: int, num_rows: int) -> None:
    log_probs = utter("A B C")
    log_probs[num_rows:] = np.nan
    result = SPEECH_RECOGNITION.postprocess(
        {"log_probs": log_probs},
        make_sample(num_frames),
        make_spec(),
        SpeechRecognitionOptions(),
        model="m",
        version="1",
    )
    assert result.text == "A B"[:num_rows].strip()


def test_alone_and_padded_in_a_batch_the_answer_is_the_same() -> None:
    spec = make_spec()
    samples = [SPEECH_RECOGNITION.decode(save(noise(seconds)), "", spec) for seconds in (0.3, 1.0, 0.71)]

    def run(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A program of a kind: each pair of frames, up to the second as far as it is there, decides for itself."""
        logits = features[:, ::2, : len(LABELS)] * np.float32(1e-2)
        return (logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))).astype(np.float32)

    batch = run(pad(samples)["features"])
    for row, sample in enumerate(samples):
        alone = run(sample.inputs["features"][None])[0]
        answers = [
            SPEECH_RECOGNITION.postprocess(
                {"log_probs": outputs},
                sample,
                spec,
                SpeechRecognitionOptions(timestamps="word"),
                model="m",
                version="1",
            )
            for outputs in (alone, batch[row])
        ]
        assert answers[0] == answers[1]


# Decoding


def test_the_beam_of_the_spec_is_used_unless_the_request_names_one() -> None:
    log_probs = np.log(np.array([[0.6, 1e-9, 0.4, 1e-9, 1e-9]] * 2)).astype(
        np.float32
    )  # see test_ctc: sum and path differ

    def read(spec: SpeechRecognitionSpec, **options: Any) -> str:
        chosen = SpeechRecognitionOptions.model_validate(options)
        outputs = {"log_probs": log_probs}
        return SPEECH_RECOGNITION.postprocess(outputs, make_sample(4), spec, chosen, model="m", version="1").text

    assert read(make_spec(beam_width=1)) == ""
    assert read(make_spec(beam_width=2)) == "A"
    assert read(make_spec(beam_width=2), beam_width=1) == ""
    assert read(make_spec(beam_width=1), beam_width=2) == "A"


def test_a_language_model_decides_from_a_beam_of_two_on() -> None:
    spec = make_spec(language_model=LANGUAGE_MODEL)
    assert recognise("-C-B", spec=spec, beam_width=1).text == "CB"
    assert recognise("-C-B", spec=spec, beam_width=2).text in {"", "A", "CAB"}
    assert recognise("-CAB A", spec=spec).text == "CAB A"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_log_probability_that_is_not_finite_is_the_model_s_failure(value: float) -> None:
    log_probs = utter("ABC")
    log_probs[1, 2] = value
    with pytest.raises(ModelFailed, match="finite"):
        recognise("ABC", outputs={"log_probs": log_probs})


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (3, 6), (0, 5)])
def test_a_wrong_number_of_rows_or_labels_is_the_model_s_failure(shape: tuple[int, int]) -> None:
    with pytest.raises(ModelFailed):
        recognise("ABC", outputs={"log_probs": np.zeros(shape, np.float32)})


# Explanations


def test_clusters_are_asked_for_only_where_they_are_wanted() -> None:
    assert SPEECH_RECOGNITION.outputs(SpeechRecognitionOptions(), make_spec()) == ("log_probs",)
    explained = SpeechRecognitionOptions(explain="clusters")
    assert SPEECH_RECOGNITION.outputs(explained, make_spec()) == ("log_probs", "clusters")


def test_clusters_are_told_as_runs_without_padding() -> None:
    ids = np.array([[[7, 0, 0, 0, 9, 9], [1, 2, 1, 2, 9, 9]], [[5, 5, 5, 5, 9, 9], [0, 0, 0, 3, 9, 9]]], np.int32)
    result = recognise("ABC-", outputs={"clusters": ids}, explain="clusters")
    assert json.loads(result.model_dump_json(exclude_none=True))["clusters"] == {
        "is_clustered": True,
        "frame_seconds": 0.02,
        "num_frames": 4,
        "layers": [[[[7, 1], [0, 3]], [[1, 1], [2, 1], [1, 1], [2, 1]]], [[[5, 4]], [[0, 3], [3, 1]]]],
    }


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 4), (4,)])
def test_clusters_of_another_shape_are_the_model_s_failure(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelFailed, match="a cluster for each frame"):
        recognise("ABC-", outputs={"clusters": np.zeros(shape, np.int32)}, explain="clusters")


def test_a_short_recording_is_said_not_to_be_clustered() -> None:
    ids = np.full((1, 2, 4), -1, np.int32)
    clusters = recognise("ABC-", outputs={"clusters": ids}, explain="clusters").clusters
    assert clusters is not None
    assert (clusters.is_clustered, clusters.layers) == (False, [])


def test_a_model_without_clusters_refuses_to_explain_them() -> None:
    explained = SpeechRecognitionOptions(explain="clusters")
    SPEECH_RECOGNITION.check_options(explained, make_spec())
    SPEECH_RECOGNITION.check_options(SpeechRecognitionOptions(), make_spec(has_clusters=False))
    with pytest.raises(InvalidInput) as caught:
        SPEECH_RECOGNITION.check_options(explained, make_spec(has_clusters=False))
    assert str(caught.value).count("; ") == 2


# Options and spec


@pytest.mark.parametrize(
    "options",
    [
        {"timestamps": "letter"},
        {"beam_width": 0},
        {"beam_width": 65},
        {"beam_width": "wide"},
        {"explain": "all"},
        {"top_k": 1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SpeechRecognitionOptions.model_validate(options)


def test_options_are_read_from_a_query() -> None:
    options = SpeechRecognitionOptions.model_validate({"timestamps": "word", "beam_width": "8", "explain": "clusters"})
    assert (options.timestamps, options.beam_width, options.explain) == ("word", 8, "clusters")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"labels": (" ", "A")}, 'labels must be "" and then single characters'),
        ({"labels": ("", "A", "A")}, "differ from each other"),
        ({"labels": ("", "AB")}, "single characters"),
        ({"labels": ("",)}, "at least 2 items"),
        ({"min_seconds": 0.03}, "min_seconds=0.03 must be at least window and hop, 0.035"),
        ({"sample_rate_hz": 8_000}, "high_hz=8000 must be at most half of sample_rate_hz=8000"),
        ({"beam_width": 65}, "less than or equal to 64"),
        ({"subsampling": 0}, "greater than or equal to 1"),
        ({"language_model": LANGUAGE_MODEL, "labels": ("", "A", "B", "C")}, r"language_model needs \[' '\]"),
        ({"language_model": LANGUAGE_MODEL, "labels": ("", " ", "A", "C")}, r"language_model needs \['B'\]"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        make_spec(**changes)


def test_a_spec_survives_json() -> None:
    spec = make_spec(language_model=LANGUAGE_MODEL)
    assert SpeechRecognitionSpec.model_validate_json(json.dumps(spec.model_dump(mode="json"))) == spec


def test_the_longest_recording_tells_what_a_bucket_must_hold() -> None:
    assert make_spec().max_frames == math.floor((5.0 - 0.025) / 0.01) + 1


@pytest.mark.parametrize("model", [SpeechRecognitionSpec, SpeechRecognitionOptions, SpeechRecognitionResult])
def test_every_field_is_described(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    for part in [schema, *schema.get("$defs", {}).values()]:
        assert all("description" in field for field in part["properties"].values())
