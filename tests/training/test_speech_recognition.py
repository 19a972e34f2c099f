from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from models.ctc_transformer import CtcTransformer
from tests.training.tone_corpus import MODEL, PROBLEM, write_corpus
from training import choose_words
from training.optimizers import MuonAdamW, OptimizerConfig
from training.speech_augmentation import SpeechAugmentation
from training.speech_recognition import SpeechRecognition, WordModel, join_evenly


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Up to three words an utterance."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 3)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One word an utterance, which a model learns at once."""
    return write_corpus(tmp_path_factory.mktemp("words"), 1)


def test_every_utterance_is_heard_at_every_speed(corpus: Path) -> None:
    examples = PROBLEM.load(corpus)
    assert len(examples) == 32
    for (plain, fast), seconds in zip(examples.features, examples.seconds, strict=True):
        assert len(plain) == pytest.approx(seconds * 100, abs=3)
        assert len(fast) == pytest.approx(seconds * 100 / 1.1, abs=3)


def test_a_character_without_a_label_is_refused(corpus: Path) -> None:
    problem = SpeechRecognition(**{**vars(PROBLEM), "labels": ("", " ", "A")})
    with pytest.raises(ValueError, match="'B'"):
        problem.load(corpus)


def test_joined_recordings_have_about_the_same_length() -> None:
    lengths = [5, 9, 3, 8, 7, 1, 4, 4]
    groups = join_evenly(lengths, 3)
    assert sorted(i for group in groups for i in group) == list(range(8))
    totals = [sum(lengths[i] for i in group) for group in groups]
    assert max(totals) - min(totals) <= 2
    assert join_evenly([4, 2], 5) == [[0], [1]]


class Remember(nn.Module):
    """Takes what it is given; every label is as probable as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        self.seen.append((features, lengths))
        logits = torch.zeros(len(features), (features.shape[1] + 1) // 2, 4) + self.anything
        return logits.log_softmax(dim=-1), []


def test_a_batch_holds_all_its_utterances_whatever_is_joined(corpus: Path) -> None:
    problem = SpeechRecognition(**{**vars(PROBLEM), "speeds": (1.0,), "augmentation": SpeechAugmentation()})
    examples, model, rows = problem.load(corpus), Remember(), torch.arange(8)
    for seed in range(8):
        problem.loss(model, examples, rows, progress=0.0, rng=Generator().manual_seed(seed))
    expected = sum(len(examples.features[row][0]) for row in range(8))
    assert {int(lengths.sum()) for _, lengths in model.seen} == {expected}
    assert {len(lengths) for _, lengths in model.seen} == {8, 2}
    for features, lengths in model.seen:
        assert features.shape[1] == lengths.max()


def test_the_loss_is_that_of_the_joined_text(corpus: Path) -> None:
    problem = SpeechRecognition(
        **{**vars(PROBLEM), "speeds": (1.0,), "join_sizes": (2,), "augmentation": SpeechAugmentation()}
    )
    examples, model = problem.load(corpus), Remember()
    loss = problem.loss(model, examples, torch.arange(2), progress=0.0, rng=Generator())
    ((_, lengths),) = model.seen
    order = sorted(range(2), key=lambda row: -len(examples.features[row][0]))
    text = " ".join(examples.texts[row] for row in order)
    target = torch.tensor([problem.labels.index(character) for character in text])
    N = (int(lengths[0]) + 1) // 2
    uniform = torch.full((N, 1, 4), 0.25).log()
    expected = nn.functional.ctc_loss(uniform, target[None], torch.tensor([N]), torch.tensor([len(text)]))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("word_model", [None, WordModel(weight=0.5, word_bonus=0.0, is_closed=True, beam_width=4)])
def test_a_model_learns_two_words(words: Path, word_model: WordModel | None) -> None:
    torch.manual_seed(0)
    problem = SpeechRecognition(**{**vars(PROBLEM), "word_model": word_model})
    model = CtcTransformer(MODEL, num_classes=4)
    examples, rng, num_steps = problem.load(words), Generator().manual_seed(0), 80
    before = problem.evaluate(model.eval(), words, "test_dev")
    optimizer = MuonAdamW(model.train(), OptimizerConfig(muon_lr=2e-2, adamw_lr=1e-2), num_steps=num_steps)
    for step in range(num_steps):
        rows = torch.randperm(32, generator=rng)[:16]
        problem.loss(model, examples, rows, progress=step / num_steps, rng=rng).backward()
        optimizer.step(step)
    after = problem.evaluate(model.eval(), words, "test_dev")
    assert list(after) == ["word_error_rate", "word_error_rate_greedy", "character_error_rate_greedy"]
    assert before["word_error_rate_greedy"] > 0.5
    assert after == dict.fromkeys(after, 0.0)


def test_words_are_chosen_by_the_validation_split(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_words, "WEIGHTS", (0.0, 50.0))
    monkeypatch.setattr(choose_words, "BONUSES", (0.0,))
    monkeypatch.setattr(choose_words, "BEAM_WIDTHS", (4,))
    torch.manual_seed(0)
    found = choose_words.try_words(PROBLEM, CtcTransformer(MODEL, num_classes=4).eval(), words)
    assert len(found) == 4
    assert [rate for rate, _ in found] == sorted(rate for rate, _ in found)
    for rate, setting in found:
        problem = SpeechRecognition(**{**vars(PROBLEM), "word_model": setting})
        torch.manual_seed(0)
        model = CtcTransformer(MODEL, num_classes=4).eval()
        assert problem.evaluate(model, words, "valid")["word_error_rate"] == rate
