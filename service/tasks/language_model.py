"""A language model of words: how probable a word is after the word before it.

Order 2 with back-off: p(word | context) is listed, or else the back-off weight of the context times p(word). Knows
nothing of audio or of time; a decoder feeds it characters and gets a score whenever a word is complete.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SPACE = " "
BOUNDARY = -1  # the start of a text as a context, its end as a word


@dataclass(slots=True)
class PrefixNode:
    """The start of one or more listed words.

    Attributes:
        length: number of its characters.
        children: next character → longer start.
        word: index of the word that ends here; None where none does.
    """

    length: int = 0
    children: dict[str, "PrefixNode"] = field(default_factory=dict)
    word: int | None = None


class LanguageState(NamedTuple):
    """What the words so far mean for those to come.

    Attributes:
        score: weighted log probabilities and bonuses of the completed words, and of the characters of an unlisted one.
        context: index of the last completed word, `BOUNDARY` before the first, None if it is not listed.
        node: the word that is being spelled, as far as it is known; None once it cannot be a listed one.
    """

    score: float
    context: int | None
    node: PrefixNode | None


class LanguageModel(BaseModel):
    """Probabilities of words and how much they weigh; all logarithms are natural."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    words: tuple[str, ...] = Field(min_length=1, description="The listed words, in the characters of the labels.")
    unigrams: tuple[float, ...] = Field(
        description="Log probability of each word by itself, and last that of the end of a text."
    )
    backoffs: tuple[float, ...] = Field(
        description="Log weight of what follows each word unlisted, and last that of the start of a text."
    )
    bigrams: tuple[tuple[int, int, float], ...] = Field(
        description="Context, word and log probability: indices of words; -1 is the start as a context, the end as a "
        "word."
    )
    unknown: float = Field(description="Log probability that a word is not listed, whichever it is.")
    unknown_character: float = Field(
        le=0,
        description="Log probability of each character of such a word; without it one long word would cost less than "
        "several.",
    )
    weight: float = Field(ge=0, description="What log probabilities are multiplied with.")
    word_bonus: float = Field(description="What is added for each word.")
    is_closed: bool = Field(description="Whether only listed words may appear.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        num_words = len(self.words)
        if len(set(self.words)) < num_words or any(not word or SPACE in word for word in self.words):
            raise ValueError("words must differ from each other and hold no space")
        for name, values in (("unigrams", self.unigrams), ("backoffs", self.backoffs)):
            if len(values) != num_words + 1:
                raise ValueError(f"{name} has {len(values)} numbers; {num_words} words need {num_words + 1}")
        if not all(BOUNDARY <= index < num_words for *pair, _ in self.bigrams for index in pair):
            raise ValueError(f"bigrams name words outside -1 to {num_words - 1}")
        return self

    @cached_property
    def root(self) -> PrefixNode:
        """The starts of all listed words, as a tree."""
        root = PrefixNode()
        for index, word in enumerate(self.words):
            node = root
            for character in word:
                node = node.children.setdefault(character, PrefixNode(node.length + 1))
            node.word = index
        return root

    @cached_property
    def table(self) -> dict[tuple[int, int], float]:
        """The bigrams by context and word."""
        return {(context, word): log_prob for context, word, log_prob in self.bigrams}

    def log_prob(self, word: int | None, context: int | None) -> float:
        """Log probability of a word after another one; of an unlisted one, without its characters.

        Args:
            word: its index, `BOUNDARY` for the end of the text, None for one that is not listed.
            context: likewise, `BOUNDARY` for the start of the text.
        """
        unigram = self.unknown if word is None else self.unigrams[word]
        if context is None:
            return unigram
        listed = None if word is None else self.table.get((context, word))
        return self.backoffs[context] + unigram if listed is None else listed

    def start(self) -> LanguageState:
        """Begin a text."""
        return LanguageState(0.0, BOUNDARY, self.root)

    def advance(self, state: LanguageState, character: str) -> LanguageState | None:
        """Add a character; a space completes a word, and a space after a space means nothing.

        Returns: None if only listed words may appear and this makes another one.
        """
        if character == SPACE:
            return state if state.node is self.root else self._complete(state)
        node = None if state.node is None else state.node.children.get(character)
        if node is not None:
            return LanguageState(state.score, state.context, node)
        if self.is_closed:
            return None
        num_unpaid = 1 if state.node is None else state.node.length + 1  # a listed word is not paid for by character
        return LanguageState(state.score + num_unpaid * self.weight * self.unknown_character, state.context, None)

    def finish(self, state: LanguageState) -> float | None:
        """Score of the text if it ends here; None if only listed words may appear and the last one is not."""
        complete = state if state.node is self.root else self._complete(state)
        return None if complete is None else complete.score + self.weight * self.log_prob(BOUNDARY, complete.context)

    def _complete(self, state: LanguageState) -> LanguageState | None:
        word = None if state.node is None else state.node.word
        if word is None and self.is_closed:
            return None
        score = state.score + self.weight * self.log_prob(word, state.context) + self.word_bonus
        if word is None and state.node is not None:  # the start of a listed word, or several
            score += state.node.length * self.weight * self.unknown_character
        return LanguageState(score, word, self.root)
