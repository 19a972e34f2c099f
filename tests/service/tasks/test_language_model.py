from typing import Any

import pytest
from pydantic import ValidationError

from service.tasks.language_model import BOUNDARY, LanguageModel, LanguageState


def make_model(**changes: Any) -> LanguageModel:
    """Words BE, BEE and SEE; BE BEE, SEE at the end and BE at the start are listed pairs."""
    fields = {
        "words": ("BE", "BEE", "SEE"),
        "unigrams": (-1.0, -2.0, -3.0, -4.0),
        "backoffs": (-0.1, -0.2, -0.3, -0.4),
        "bigrams": ((0, 1, -0.5), (2, BOUNDARY, -0.6), (BOUNDARY, 0, -0.7)),
        "unknown": -9.0,
        "unknown_character": -0.01,
        "weight": 1.0,
        "word_bonus": 0.0,
        "is_closed": True,
    }
    return LanguageModel.model_validate({**fields, **changes})


def spell(model: LanguageModel, text: str) -> LanguageState | None:
    state: LanguageState | None = model.start()
    for character in text:
        if state is not None:
            state = model.advance(state, character)
    return state


def score(model: LanguageModel, text: str) -> float | None:
    state = spell(model, text)
    return None if state is None else model.finish(state)


@pytest.mark.parametrize(
    ("word", "context", "log_prob"),
    [
        (1, 0, -0.5),  # listed
        (BOUNDARY, 2, -0.6),
        (0, BOUNDARY, -0.7),
        (2, 0, -0.1 - 3.0),  # not listed: back-off weight of the context, then the word by itself
        (1, BOUNDARY, -0.4 - 2.0),
        (BOUNDARY, 0, -0.1 - 4.0),
        (None, 1, -0.2 - 9.0),
        (1, None, -2.0),  # nothing is known of an unlisted context
    ],
)
def test_pairs_are_looked_up_and_others_backed_off(word: int | None, context: int | None, log_prob: float) -> None:
    assert make_model().log_prob(word, context) == log_prob


def test_a_text_is_scored_word_by_word_with_its_end() -> None:
    assert score(make_model(), "BE BEE") == pytest.approx(-0.7 - 0.5 + (-0.2 - 4.0))
    assert score(make_model(), "") == pytest.approx(-0.4 - 4.0)


def test_a_word_counts_once_a_space_follows() -> None:
    states = [spell(make_model(), text) for text in ("B", "BE", "BE ", "BE S")]
    assert [state and state.score for state in states] == [0.0, 0.0, -0.7, -0.7]


def test_weight_multiplies_and_each_word_earns_the_bonus() -> None:
    model = make_model(weight=2.0, word_bonus=10.0)
    assert score(model, "BE BEE") == pytest.approx(2 * (-0.7 - 0.5 - 0.2 - 4.0) + 20)


def test_spaces_around_words_and_between_them_mean_nothing() -> None:
    assert score(make_model(), "  BE   BEE ") == score(make_model(), "BE BEE")


@pytest.mark.parametrize("text", ["X", "BEES", "B ", "BE B ", "SEX"])
def test_a_closed_model_lets_only_listed_words_through(text: str) -> None:
    assert spell(make_model(), text) is None


def test_a_closed_model_ends_no_text_within_a_word() -> None:
    assert spell(make_model(), "BE S") is not None
    assert score(make_model(), "BE S") is None


@pytest.mark.parametrize("word", ["B", "X", "BEEP", "SE", "BEX", "XYZXYZ"])
def test_an_open_model_scores_other_words_as_unknown_and_by_character(word: str) -> None:
    model = make_model(is_closed=False)
    characters = -0.01 * len(word)
    assert score(model, f"BE {word} BEE") == pytest.approx(-0.7 + (-0.1 - 9.0) + characters + -2.0 + (-0.2 - 4.0))
    assert score(model, word) == pytest.approx(-0.4 - 9.0 + characters - 4.0)
    heavy = make_model(is_closed=False, weight=3.0)
    assert score(heavy, word) == pytest.approx(3 * (-0.4 - 9.0 + characters - 4.0))


def test_a_model_survives_json() -> None:
    model = make_model()
    assert score(LanguageModel.model_validate_json(model.model_dump_json()), "BE BEE") == score(model, "BE BEE")
    assert LanguageModel.model_validate_json(model.model_dump_json()).model_dump() == model.model_dump()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"words": ("BE", "BE", "SEE")}, "words must differ"),
        ({"words": ("BE", "A B", "SEE")}, "words must differ from each other and hold no space"),
        ({"words": ("BE", "", "SEE")}, "words must differ"),
        ({"words": ()}, "at least 1 item"),
        ({"unigrams": (-1.0, -2.0, -3.0)}, "unigrams has 3 numbers; 3 words need 4"),
        ({"backoffs": (-1.0,)}, "backoffs has 1 numbers; 3 words need 4"),
        ({"bigrams": ((0, 3, -1.0),)}, "bigrams name words outside -1 to 2"),
        ({"bigrams": ((-2, 0, -1.0),)}, "bigrams name words outside -1 to 2"),
        ({"weight": -1.0}, "greater than or equal to 0"),
        ({"unknown": float("-inf")}, "finite"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        make_model(**changes)


def test_every_field_is_described() -> None:
    assert all("description" in field for field in LanguageModel.model_json_schema()["properties"].values())
