import math

import pytest

from service.tasks.language_model import BOUNDARY, LanguageModel
from training.word_model import build_language_model

TRANSCRIPTS = ["GO", "GO ON", "STOP", "GO GO ON", ""]


def build(*transcripts: str, vocabulary: tuple[str, ...] = ()) -> LanguageModel:
    return build_language_model(transcripts or TRANSCRIPTS, weight=0.5, word_bonus=0.25, is_closed=True,
                                vocabulary=vocabulary)  # fmt: skip


def test_words_are_listed_in_order_with_those_of_the_vocabulary() -> None:
    assert build().words == ("GO", "ON", "STOP")
    assert build(vocabulary=("AWAY", "GO")).words == ("AWAY", "GO", "ON", "STOP")


@pytest.mark.parametrize("vocabulary", [(), ("AWAY", "BACK")])
def test_probabilities_sum_to_one_after_every_context(vocabulary: tuple[str, ...]) -> None:
    model = build(vocabulary=vocabulary)
    words = [*range(len(model.words)), BOUNDARY, None]
    for context in words:
        assert sum(math.exp(model.log_prob(word, context)) for word in words) == pytest.approx(1, rel=1e-12)


def test_probabilities_are_those_computed_by_hand() -> None:
    model = build("A B", "A")
    # Words A 2, B 1, end 2: 5 of 3 kinds; listed are A, B, the end and an unlisted word: 4 places.
    unigrams = [(2 + 3 / 4) / 8, (1 + 3 / 4) / 8, (2 + 3 / 4) / 8]
    assert [math.exp(value) for value in model.unigrams] == pytest.approx(unigrams, rel=1e-12)
    assert math.exp(model.unknown) == pytest.approx(3 / 4 / 8, rel=1e-12)
    assert math.exp(model.unknown_character) == pytest.approx(1 / 2, rel=1e-12)
    # After A: B once and the end once, 2 of 2 kinds.
    assert math.exp(model.log_prob(1, 0)) == pytest.approx((1 + 2 * unigrams[1]) / 4, rel=1e-12)
    assert math.exp(model.log_prob(0, 0)) == pytest.approx(2 / 4 * unigrams[0], rel=1e-12)
    # At the start: A twice, 2 of 1 kind.
    assert math.exp(model.log_prob(0, BOUNDARY)) == pytest.approx((2 + unigrams[0]) / 3, rel=1e-12)


def test_a_word_without_followers_backs_off_completely() -> None:
    model = build("A", vocabulary=("Z",))
    assert model.log_prob(0, model.words.index("Z")) == model.unigrams[0]


def test_the_weights_are_passed_on() -> None:
    model = build_language_model(["A"], weight=0.7, word_bonus=-1.5, is_closed=False)
    assert (model.weight, model.word_bonus, model.is_closed) == (0.7, -1.5, False)


def test_the_order_of_transcripts_does_not_matter() -> None:
    assert build(*TRANSCRIPTS) == build(*reversed(TRANSCRIPTS))


@pytest.mark.parametrize("transcripts", [[], ["", " "]])
def test_transcripts_without_words_are_refused(transcripts: list[str]) -> None:
    with pytest.raises(ValueError, match="no words"):
        build_language_model(transcripts, weight=1, word_bonus=0, is_closed=False, vocabulary=["A"])
