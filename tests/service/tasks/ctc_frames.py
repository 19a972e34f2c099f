"""Frames for tests of CTC, and how what was found in them is read."""

import numpy as np
import numpy.typing as npt

from service.tasks.ctc import Hypothesis, split_words

LABELS = ("", " ", "A", "B")

Array = npt.NDArray[np.float64]


def draw(num_frames: int, num_labels: int, seed: int, *, sharpness: float = 1.5) -> Array:
    """Log probabilities (T, L) of chance."""
    logits = np.random.default_rng(seed).normal(0, sharpness, (num_frames, num_labels))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def sure(path: str, *, labels: tuple[str, ...] = LABELS, probability: float = 0.97) -> Array:
    """Log probabilities that favour a path, written with `-` for blanks."""
    rest = (1 - probability) / (len(labels) - 1)
    probabilities = np.full((len(path), len(labels)), rest)
    for frame, character in enumerate(path):
        probabilities[frame, labels.index("" if character == "-" else character)] = probability
    return np.log(probabilities)


def spelled(hypothesis: Hypothesis) -> tuple[int, ...]:
    """Its labels."""
    return tuple(token.label for token in hypothesis.tokens)


def text_of(hypothesis: Hypothesis, labels: tuple[str, ...] = LABELS) -> str:
    """Its words."""
    return " ".join(word.text for word in split_words(hypothesis.tokens, labels))
