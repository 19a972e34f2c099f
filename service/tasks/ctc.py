"""CTC: log probabilities of labels, frame by frame → a text, and when each word was said.

Source: Graves et al. 2006 (connectionist temporal classification): a path names one label for each frame; repeated
labels are merged, then blanks removed; the probability of a text is the sum over its paths.

Label 0 is the blank. Words are what stands between spaces. Here is the text of the most probable path;
`prefix_beam_search.py` finds the most probable texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.tasks.language_model import SPACE

BLANK = 0

LogProbs = npt.NDArray[np.floating[Any]]


class Token(NamedTuple):
    """One label of a text, and the frames that the most probable path spends on it.

    Attributes:
        label: its index.
        start, end: first frame, and the one after the last.
        posterior: mean probability of the label over these frames.
    """

    label: int
    start: int
    end: int
    posterior: float


class Word(NamedTuple):
    """One word of a text.

    Attributes:
        text: its characters.
        start, end: first frame of its first token, and the one after the last of its last token.
        score: mean posterior of its tokens.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text that may have been said.

    Attributes:
        tokens: its labels in time.
        log_prob: of the acoustics: summed over its paths after a prefix search, of its best path after `greedy`.
        score: what hypotheses are ranked by: `log_prob` and the score of the language model.
    """

    tokens: tuple[Token, ...]
    log_prob: float
    score: float


def greedy(log_probs: LogProbs) -> Hypothesis:
    """Take the most probable path; of equal labels the lower index.

    Args:
        log_probs: (T, L), T at least 1.
    """
    path = log_probs.argmax(axis=1)
    values = np.take_along_axis(log_probs, path[:, None], axis=1)[:, 0].astype(np.float64)
    starts = np.flatnonzero(np.diff(path, prepend=-1))
    ends = np.append(starts[1:], len(path))
    posteriors = np.add.reduceat(np.exp(values), starts) / (ends - starts)
    runs = zip(path[starts].tolist(), starts.tolist(), ends.tolist(), posteriors.tolist(), strict=True)
    log_prob = float(values.sum())
    return Hypothesis(tuple(Token(*run) for run in runs if run[0] != BLANK), log_prob, log_prob)


def split_words(tokens: Sequence[Token], labels: Sequence[str]) -> list[Word]:
    """Put tokens together to words; spaces at the ends and repeated ones make no words."""
    words: list[Word] = []
    spelled: list[Token] = []
    for token in [*tokens, None]:
        if token is not None and labels[token.label] != SPACE:
            spelled.append(token)
        elif spelled:
            text = "".join(labels[part.label] for part in spelled)
            score = sum(part.posterior for part in spelled) / len(spelled)
            words.append(Word(text, spelled[0].start, spelled[-1].end, score))
            spelled = []
    return words
