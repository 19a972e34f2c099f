import numpy as np

from export.recordings import RECORDING, SAMPLES, cut_recordings, read_recording
from service.tasks.speech_recognition import SPEECH_RECOGNITION, SpeechRecognitionSpec
from tests.export.tiny_recogniser import CLUSTERED, make_speech_source

SPEC = SpeechRecognitionSpec.model_validate(make_speech_source(CLUSTERED).spec)


def test_the_recording_is_decoded_as_the_service_does() -> None:
    found = read_recording(SPEC)
    expected = SPEECH_RECOGNITION.decode((SAMPLES / RECORDING).read_bytes(), "", SPEC)
    np.testing.assert_array_equal(found.inputs["features"], expected.inputs["features"], strict=True)
    assert found.inputs["features"].shape == (308, 20)  # 3.1 s, a frame of 25 ms every 10 ms


def test_recordings_have_the_lengths_asked_for_within_the_task_s_limits() -> None:
    frames = [sample.length for sample in cut_recordings(SPEC, [0.025, 1.005, 7.005, 1e6])]
    assert frames == [8, 99, 699, SPEC.max_frames]  # 0.1 s at least; 120 s at most


def test_recordings_are_the_same_at_every_call_and_differ_from_each_other() -> None:
    found, again = (cut_recordings(SPEC, [2.0] * 6) for _ in range(2))
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one.inputs["features"], other.inputs["features"], strict=True)
    others = cut_recordings(SPEC, [2.0] * 6, seed=8)
    assert len({sample.inputs["features"].tobytes() for sample in (*found, *others)}) == 12


def test_a_long_recording_does_not_repeat_itself() -> None:
    features = cut_recordings(SPEC, [30.0])[0].inputs["features"]
    assert len(np.unique(features, axis=0)) > 0.95 * len(features)
