import math

import numpy as np
import pytest

from service.tasks.ctc import Token, Word, greedy, split_words
from tests.oracles import ctc as oracle
from tests.service.tasks.ctc_frames import LABELS, draw, spelled, sure

# The best path


@pytest.mark.parametrize("seed", range(20))
def test_greedy_finds_the_most_probable_path(seed: int) -> None:
    log_probs = draw(5, 4, seed)
    path, probability = max(oracle.paths(log_probs), key=lambda pair: pair[1])
    found = greedy(log_probs)
    assert [token[:3] for token in found.tokens] == oracle.token_spans(path)
    assert found.log_prob == found.score == pytest.approx(math.log(probability), rel=1e-12)


def test_a_token_s_posterior_is_the_mean_over_its_frames() -> None:
    log_probs = np.log(np.array([[0.1, 0.1, 0.8, 0], [0.2, 0.2, 0.6, 0], [0.9, 0.1, 0, 0], [0.3, 0, 0, 0.7]]) + 1e-30)
    assert greedy(log_probs).tokens == (Token(2, 0, 2, pytest.approx(0.7)), Token(3, 3, 4, pytest.approx(0.7)))


def test_of_equal_labels_greedy_takes_the_lower() -> None:
    assert greedy(np.log(np.full((3, 4), 0.25))).tokens == ()
    assert spelled(greedy(np.log(np.array([[0.2, 0.2, 0.3, 0.3]])))) == (2,)


# Words


def test_words_stand_between_spaces() -> None:
    found = greedy(sure("--AA-B --  B-"))
    assert split_words(found.tokens, LABELS) == [
        Word("AB", 2, 6, pytest.approx(0.97)),
        Word("B", 11, 12, pytest.approx(0.97)),
    ]


def test_spaces_alone_are_no_words() -> None:
    assert split_words(greedy(sure(" -  -")).tokens, LABELS) == []
    assert split_words((), LABELS) == []


def test_a_word_s_score_is_the_mean_of_its_tokens_whatever_their_length() -> None:
    tokens = (Token(2, 0, 9, 0.9), Token(3, 9, 10, 0.5), Token(1, 10, 11, 0.1), Token(3, 11, 12, 0.4))
    assert [word.score for word in split_words(tokens, LABELS)] == [pytest.approx(0.7), pytest.approx(0.4)]
