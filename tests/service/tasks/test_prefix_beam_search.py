import math
import time
import tracemalloc

import numpy as np
import pytest

from service.tasks.ctc import Hypothesis, greedy
from service.tasks.language_model import BOUNDARY, LanguageModel
from service.tasks.prefix_beam_search import OPEN_TOKENS, prefix_beam_search
from tests.oracles import ctc as oracle
from tests.service.tasks.ctc_frames import LABELS, Array, draw, spelled, sure, text_of

EVERYTHING = 10_000  # a beam that no case here fills


def search_all(log_probs: Array, **options: object) -> list[Hypothesis]:
    options = {"beam_width": EVERYTHING, "num_best": EVERYTHING, "min_log_prob": -math.inf, **options}
    return prefix_beam_search(log_probs, LABELS[: log_probs.shape[1]], **options)


# The sum over paths


@pytest.mark.parametrize(("num_frames", "num_labels"), [(1, 4), (2, 3), (4, 4), (5, 3), (6, 2), (6, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_a_search_of_everything_finds_every_text_with_its_probability(
    num_frames: int, num_labels: int, seed: int
) -> None:
    log_probs = draw(num_frames, num_labels, seed)
    expected = oracle.labelling_probabilities(log_probs)
    found = search_all(log_probs)
    assert {spelled(hypothesis) for hypothesis in found} == expected.keys()
    for hypothesis in found:
        assert math.exp(hypothesis.log_prob) == pytest.approx(expected[spelled(hypothesis)], rel=1e-12)
        assert hypothesis.score == hypothesis.log_prob
    assert sum(math.exp(hypothesis.log_prob) for hypothesis in found) == pytest.approx(1, rel=1e-12)
    assert [hypothesis.score for hypothesis in found] == sorted((one.score for one in found), reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_the_times_of_every_text_are_those_of_its_best_path(seed: int) -> None:
    log_probs = draw(5, 4, seed)
    for hypothesis in search_all(log_probs):
        path = oracle.best_path(log_probs, spelled(hypothesis))
        assert [token[:3] for token in hypothesis.tokens] == oracle.token_spans(path)
        for label, start, end, posterior in hypothesis.tokens:
            assert posterior == pytest.approx(np.exp(log_probs[start:end, label]).mean(), rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_a_narrow_beam_finds_a_text_that_is_nearly_the_best(seed: int) -> None:
    log_probs = draw(6, 4, seed, sharpness=3)
    expected = oracle.labelling_probabilities(log_probs)
    found = prefix_beam_search(log_probs, LABELS, beam_width=8, num_best=8)
    assert len(found) == 8
    assert expected[spelled(found[0])] > 0.9 * max(expected.values())
    assert all(math.exp(one.log_prob) <= expected[spelled(one)] * (1 + 1e-12) for one in found)
    assert len({spelled(one) for one in found}) == 8  # none comes twice


def test_the_sum_beats_the_best_path() -> None:
    # "A" has the paths A-, -A and AA, together 0.55; the empty text has the most probable path, 0.36.
    log_probs = np.log(np.array([[0.6, 0, 0.4, 0], [0.6, 0, 0.4, 0]]) + 1e-30)
    assert spelled(greedy(log_probs)) == ()
    best, second = prefix_beam_search(log_probs, LABELS, beam_width=2, num_best=2)
    assert (spelled(best), spelled(second)) == ((2,), ())
    assert math.exp(best.log_prob) == pytest.approx(0.64)


def test_a_prefix_that_left_the_beam_and_came_back_is_one_with_its_continuations() -> None:
    for seed in range(200):
        log_probs = draw(12, 4, seed)
        found = prefix_beam_search(log_probs, LABELS, beam_width=3, num_best=3, min_log_prob=-math.inf)
        assert len({spelled(one) for one in found}) == len(found)


def test_probabilities_far_below_the_smallest_double_are_summed() -> None:
    log_probs = np.tile(draw(4, 4, 5), (600, 1)) - 10.0  # e to the -24000 and below
    best = prefix_beam_search(log_probs, LABELS, beam_width=4)[0]
    shifted = prefix_beam_search(log_probs + 10.0, LABELS, beam_width=4, min_log_prob=math.log(1e-4) + 10)[0]
    assert spelled(best) == spelled(shifted)
    assert best.log_prob == pytest.approx(shifted.log_prob - 24_000, rel=1e-9)


# Ties


def test_of_equal_texts_the_shorter_then_the_lower_label_comes_first() -> None:
    found = search_all(np.log(np.full((1, 4), 0.25)))
    assert [spelled(hypothesis) for hypothesis in found] == [(), (1,), (2,), (3,)]


def test_the_same_input_gives_the_same_hypotheses() -> None:
    log_probs = np.round(draw(40, 4, 9), 1)  # rounding makes ties
    first, second = (prefix_beam_search(log_probs, LABELS, beam_width=5, num_best=5) for _ in range(2))
    assert first == second
    assert prefix_beam_search(log_probs, LABELS, beam_width=5, num_best=2) == first[:2]


# What is left out


@pytest.mark.parametrize("seed", range(5))
def test_pauses_change_nothing_but_times(seed: int) -> None:
    speech = draw(6, 4, seed, sharpness=4)
    pause = np.log(np.array([1 - 3e-6, 1e-6, 1e-6, 1e-6]))
    log_probs = np.concatenate([np.tile(pause, (50, 1)), speech[:3], np.tile(pause, (70, 1)), speech[3:], pause[None]])
    exact = prefix_beam_search(log_probs, LABELS, beam_width=50, min_log_prob=-math.inf)[0]
    quick = prefix_beam_search(log_probs, LABELS, beam_width=50)[0]
    assert [token[:3] for token in quick.tokens] == [token[:3] for token in exact.tokens]
    assert quick.log_prob == pytest.approx(exact.log_prob, abs=2e-3)


def test_a_recording_of_pauses_alone_is_the_empty_text() -> None:
    found = prefix_beam_search(np.tile(np.log(np.array([1 - 3e-6, 1e-6, 1e-6, 1e-6])), (9, 1)), LABELS, beam_width=8)
    assert found == [Hypothesis((), pytest.approx(9 * math.log(1 - 3e-6)), pytest.approx(9 * math.log(1 - 3e-6)))]


def test_labels_below_the_limit_are_not_considered() -> None:
    log_probs = np.log(np.array([[0.5, 0.02, 0.48, 1e-9], [0.98, 0.02, 1e-9, 1e-9]]))
    found = prefix_beam_search(log_probs, LABELS, beam_width=50, num_best=50, min_log_prob=math.log(0.1))
    assert {spelled(one): pytest.approx(math.exp(one.log_prob)) for one in found} == {(): 0.49, (2,): 0.4704}


def make_long_speech(num_frames: int) -> Array:
    """Speech of 30 labels at 50 frames a second: two in three frames are pauses, others hesitate between labels."""
    rng = np.random.default_rng(0)
    probabilities = np.full((num_frames, 30), 1e-6)
    probabilities[:, 0] = 1
    spoken = np.flatnonzero(np.arange(num_frames) % 3 == 0)
    chosen, rival = rng.integers(1, 30, (2, len(spoken)))
    probabilities[spoken, 0] = 0.2
    probabilities[spoken, chosen] = 0.7
    probabilities[spoken, rival] = 0.1
    return np.log(probabilities / probabilities.sum(axis=1, keepdims=True))


def test_half_an_hour_stays_cheap() -> None:
    log_probs = make_long_speech(9_000)  # a tenth of it: time and memory grow with the length
    labels = ("", " ", *map(chr, range(65, 93)))
    started = time.thread_time()
    (best,) = prefix_beam_search(log_probs, labels, beam_width=8)
    assert time.thread_time() - started < 3  # a quarter of a second is usual
    assert len(best.tokens) > 2_500
    peaks = []
    for num_frames in (2_000, 8_000):
        tracemalloc.start()
        prefix_beam_search(log_probs[:num_frames], labels, beam_width=8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 6 * peaks[0]  # with its square it would be 16
    assert peaks[1] < 4_000_000


def test_old_doubts_leave_room_for_new_ones() -> None:
    # At every third frame A and B are nearly as probable: with eight texts, three doubts would fill the beam for good.
    doubt = np.log(np.array([[1e-6, 1e-6, 0.51, 0.49], [1, 1e-6, 1e-6, 1e-6], [1, 1e-6, 1e-6, 1e-6]]))
    found = prefix_beam_search(np.tile(doubt, (400, 1)), LABELS, beam_width=8, num_best=8)
    assert spelled(found[0]) == (2,) * 400
    for one in found[1:]:
        assert len(one.tokens) == 400
        differing = [index for index, label in enumerate(spelled(one)) if label != 2]
        assert min(differing) >= 400 - 2 * OPEN_TOKENS


# Language models


def make_model(**changes: object) -> LanguageModel:
    """The words A, AB and B; B after A is likely."""
    fields = {
        "words": ("A", "AB", "B"),
        "unigrams": (-1.5, -2.0, -0.8, -1.0),
        "backoffs": (-0.3, -0.2, -0.1, -0.4),
        "bigrams": ((0, 2, -0.1), (BOUNDARY, 1, -3.0), (2, BOUNDARY, -0.2)),
        "unknown": -4.0,
        "unknown_character": -0.7,
        "weight": 0.8,
        "word_bonus": 0.5,
        "is_closed": False,
    }
    return LanguageModel.model_validate({**fields, **changes})


def language_score(model: LanguageModel, labels: tuple[int, ...]) -> float:
    """Score of a text from the fields alone."""
    words = "".join(LABELS[label] for label in labels).split()
    numbers = [model.words.index(word) if word in model.words else None for word in words]
    listed = {(context, word): value for context, word, value in model.bigrams}
    context = BOUNDARY
    total = model.weight * model.unknown_character * sum(len(word) for word in words if word not in model.words)
    for number in [*numbers, BOUNDARY]:
        value = model.unknown if number is None else model.unigrams[number]
        if context is not None:
            value = listed.get((context, number), model.backoffs[context] + value)
        total += model.weight * value
        context = number
    return total + model.word_bonus * len(numbers)


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_language_model_is_added_to_every_text(seed: int, is_closed: bool) -> None:
    log_probs = draw(6, 4, seed)
    model = make_model(is_closed=is_closed)
    expected = {
        labels: math.log(probability) + language_score(model, labels)
        for labels, probability in oracle.labelling_probabilities(log_probs).items()
        if not is_closed or set("".join(LABELS[label] for label in labels).split()) <= set(model.words)
    }
    found = search_all(log_probs, language_model=model)
    assert {spelled(one) for one in found} == expected.keys()
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert one.score == pytest.approx(expected[spelled(one)], rel=1e-12)


def test_a_language_model_decides_between_words_that_sound_alike() -> None:
    log_probs = sure("A- -B")
    log_probs[-1] = np.log([0.02, 0.02, 0.49, 0.47])
    assert text_of(prefix_beam_search(log_probs, LABELS, beam_width=8)[0]) == "A A"
    assert text_of(prefix_beam_search(log_probs, LABELS, beam_width=8, language_model=make_model())[0]) == "A B"


def test_a_closed_model_spells_nothing_else() -> None:
    log_probs = sure("B-A-B")
    assert text_of(prefix_beam_search(log_probs, LABELS, beam_width=8)[0]) == "BAB"
    closed = make_model(is_closed=True)
    for one in prefix_beam_search(log_probs, LABELS, beam_width=8, num_best=8, language_model=closed):
        assert set(text_of(one).split()) <= {"A", "AB", "B"}


def test_a_last_word_that_a_closed_model_cannot_complete_is_left_out() -> None:
    model = make_model(is_closed=True, words=("A", "ABBA", "B"))
    log_probs = sure("B -A-B", probability=1 - 1e-12)
    (best,) = prefix_beam_search(log_probs, LABELS, beam_width=1, language_model=model)
    assert text_of(best) == "B"
    assert [token[:3] for token in best.tokens] == [(3, 0, 1)]
    (nothing,) = prefix_beam_search(log_probs[3:], LABELS, beam_width=1, language_model=model)
    assert nothing.tokens == ()
