from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.clustering_recordings import count_tokens, count_word_errors, join_recordings, take_first
from tests.training.tone_corpus import PROBLEM, write_corpus
from training.speech_recognition import Utterances


def make_utterances(seconds: list[float]) -> Utterances:
    """Utterance i says the word W{i}, and its features are all i."""
    return Utterances(
        features=[[torch.full((round(100 * length), 2), float(i))] for i, length in enumerate(seconds)],
        targets=[torch.tensor([2])] * len(seconds),
        texts=[f"W{i}" for i in range(len(seconds))],
        seconds=seconds,
    )


def test_joined_recordings_hold_every_utterance_once_in_the_order_of_their_words() -> None:
    joined = join_recordings(make_utterances([2.0, 3.0, 1.0, 4.0, 2.0]), seconds=6.0)
    assert len(joined) == 2
    assert sum(joined.seconds) == 12.0
    assert max(joined.seconds) - min(joined.seconds) <= 1.0
    said = []
    for (features,), text, seconds in zip(joined.features, joined.texts, joined.seconds, strict=True):
        heard = features[:, 0].unique_consecutive().int().tolist()
        assert text.split() == [f"W{i}" for i in heard]
        assert len(features) == round(100 * seconds)
        said += heard
    assert sorted(said) == list(range(5))


def test_what_is_shorter_than_asked_for_is_one_recording() -> None:
    assert join_recordings(make_utterances([1.0, 1.0]), seconds=45.0).texts == ["W0 W1"]


def test_tokens_are_counted_as_the_model_makes_them() -> None:
    assert count_tokens(PROBLEM, make_utterances([0.5, 0.51])) == [25, 26]


def test_only_the_first_examples_are_taken() -> None:
    examples = make_utterances([1.0, 2.0, 3.0])
    assert take_first(examples, 2).texts == ["W0", "W1"]
    assert take_first(examples, None) == examples


def test_words_are_counted_in_what_the_service_would_answer(tmp_path: Path) -> None:
    problem = replace(PROBLEM, speeds=(1.0,))
    examples = take_first(problem.read(write_corpus(tmp_path, 3), "test_dev"), 2)
    spoken = []
    for row, text in enumerate(examples.texts):
        labels = [label for character in text for label in (problem.labels.index(character), 0)]
        log_probs = torch.full((count_tokens(problem, examples)[row], len(problem.labels)), -20.0)
        log_probs[:, 0] = 0.0
        for frame, label in enumerate(labels):
            log_probs[frame] = -20.0
            log_probs[frame, label] = 0.0
        spoken.append(log_probs)
    spec = problem.make_spec(tmp_path)
    num_words = sum(len(text.split()) for text in examples.texts)
    assert count_word_errors(problem, spoken, examples, spec, beam_width=1) == (0, num_words)
    silent = torch.full_like(spoken[0], -20.0)
    silent[:, 0] = 0.0
    missed = count_word_errors(problem, [silent, spoken[1]], examples, spec, beam_width=None)
    assert missed == (len(examples.texts[0].split()), num_words)
