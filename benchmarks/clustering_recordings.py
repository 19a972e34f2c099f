"""Joined recordings, as features, and how many of their words a model gets wrong."""

from collections.abc import Sequence

import torch
from torch import Tensor

from service.tasks.language_model import SPACE
from service.tasks.speech_recognition import SpeechRecognitionSpec
from training.error_rate import ErrorCount, count_errors
from training.speech_recognition import SpeechRecognition, Utterances, join_evenly


def join_recordings(examples: Utterances, *, seconds: float) -> Utterances:
    """Join utterances, of several speakers, to recordings of about the same length; nothing is said twice.

    Args:
        examples: each at one speed.
        seconds: about, of a joined recording.
    Returns: recordings without targets: they are not for training.
    """
    num = max(1, round(sum(examples.seconds) / seconds))
    groups = join_evenly([len(features[0]) for features in examples.features], num)
    return Utterances(
        features=[[torch.cat([examples.features[row][0] for row in sorted(group)])] for group in groups],
        targets=[torch.empty(0, dtype=torch.int64) for _ in groups],
        texts=[SPACE.join(examples.texts[row] for row in sorted(group)) for group in groups],
        seconds=[sum(examples.seconds[row] for row in group) for group in groups],
    )


def take_first(examples: Utterances, num: int | None) -> Utterances:
    """Take the first so many examples; None takes all."""
    return Utterances(examples.features[:num], examples.targets[:num], examples.texts[:num], examples.seconds[:num])


def count_tokens(problem: SpeechRecognition, examples: Utterances) -> list[int]:
    """Count the tokens that a model makes of each recording at its own speed."""
    return [-(-len(features[0]) // problem.subsampling) for features in examples.features]


def count_word_errors(
    problem: SpeechRecognition,
    log_probs: Sequence[Tensor],
    examples: Utterances,
    spec: SpeechRecognitionSpec,
    *,
    beam_width: int | None,
) -> ErrorCount:
    """Count wrong words in what the service would answer.

    Args:
        problem: whose search for the text is asked.
        log_probs: (N, V) for each recording.
        examples: the recordings.
        spec: what the service is told.
        beam_width: 1 is without search and words, None what the spec says.
    """
    count = ErrorCount()
    for row, text in enumerate(examples.texts):
        found = problem.find_text(log_probs[row], examples, row, spec, beam_width=beam_width)
        count += count_errors(text.split(), found.split())
    return count
