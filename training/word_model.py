"""The language model of a speech recogniser, counted from the transcripts that it is trained on.

Which words it lists and how probable they are is found here; how much that weighs is found by trying on the validation
split, and passed in.
"""

import math
from collections import Counter
from collections.abc import Iterable

from service.tasks.language_model import BOUNDARY, LanguageModel


def build_language_model(
    transcripts: Iterable[str],
    *,
    weight: float,
    word_bonus: float,
    is_closed: bool,
    vocabulary: Iterable[str] = (),
) -> LanguageModel:
    """Count words and pairs of words.

    With c(v, w) the count of w after v, c(v) the count of all words after v, and n(v) the number of different ones:

        p(w | v) = (c(v, w) + n(v) p(w)) / (c(v) + n(v))      p(w) = (c(w) + n / V) / (c + n)

    where c, n are the same without a context and V counts the listed words, the end and any unlisted word. So p sums to
    one over these V, after every context, and nothing has probability zero. The characters of an unlisted word are
    drawn evenly from those of the listed ones.

    Args:
        transcripts: words separated by spaces, one text each.
        weight, word_bonus, is_closed: as in `LanguageModel`.
        vocabulary: words to list besides those of the transcripts.
    Raises: ValueError if the transcripts hold no words.
    Source: Witten and Bell 1991 (the zero-frequency problem), method C, interpolated as in Chen and Goodman 1998,
        section 2.4. Chosen over Kneser-Ney as it needs no counts of counts, which small corpora do not have.
    """
    texts = [transcript.split() for transcript in transcripts]
    if not any(texts):
        raise ValueError("the transcripts hold no words to count")
    words = tuple(sorted({word for text in texts for word in text} | set(vocabulary)))
    index = {word: number for number, word in enumerate(words)}
    pairs: Counter[tuple[int, int]] = Counter()
    for text in texts:
        numbers = [index[word] for word in text]
        pairs.update(zip([BOUNDARY, *numbers], [*numbers, BOUNDARY], strict=True))
    contexts, followers, counts = Counter[int](), Counter[int](), Counter[int]()
    for (context, word), count in pairs.items():
        contexts[context] += count
        followers[context] += 1
        counts[word] += count
    share = len(counts) / (len(words) + 2)  # n / V
    total = counts.total() + len(counts)
    places = [*range(len(words)), BOUNDARY]
    unigrams = {word: (counts[word] + share) / total for word in places}
    return LanguageModel(
        words=words,
        unigrams=tuple(math.log(unigrams[word]) for word in places),
        backoffs=tuple(
            math.log(followers[context] / (contexts[context] + followers[context])) if followers[context] else 0.0
            for context in places
        ),
        bigrams=tuple(
            (
                context,
                word,
                math.log((count + followers[context] * unigrams[word]) / (contexts[context] + followers[context])),
            )
            for (context, word), count in sorted(pairs.items())
        ),
        unknown=math.log(share / total),
        unknown_character=-math.log(len({*"".join(words)})),
        weight=weight,
        word_bonus=word_bonus,
        is_closed=is_closed,
    )
