import os

from benchmarks.speaker_recordings import Speaker, measure_speakers
from tests.benchmarks.recordings import FakeService, count_seconds, make_recording


def test_both_ways_are_counted_for_the_same_words_and_short_speakers_one_by_one_only() -> None:
    utterances = [
        make_recording(0.5, "A B", speaker="long", seed=1),
        make_recording(0.2, "C D E", speaker="short", seed=2),
        make_recording(0.6, "F", speaker="long", seed=3),
    ]
    # Of an utterance the first word is heard; of the joined recording, all but one and one that nobody said.
    heard = {utterance.audio: utterance.text.split()[0] for utterance in utterances}
    asked: list[float] = []

    def hear(audio: bytes) -> str:
        asked.append(round(count_seconds(audio), 3))
        return heard.get(audio, "A F X")

    found = measure_speakers(FakeService(hear, os.getpid()), utterances, min_seconds=1.0)
    assert found == [
        Speaker(name="long", seconds=1.1, num_words=3, errors_alone=1, errors_joined=2),
        Speaker(name="short", seconds=0.2, num_words=3, errors_alone=2, errors_joined=None),
    ]
    assert asked == [0.5, 0.6, 1.1, 0.2]
