"""CTC decoding: log probabilities of labels, frame by frame → the most probable text, and when each word was said.

Source: Graves et al. 2006 (connectionist temporal classification): a path names one label for each frame; repeated
labels are merged, then blanks removed; the probability of a text is the sum over its paths. Prefix search: Hannun et
al. 2014 (first-pass large vocabulary continuous speech recognition), algorithm 1.

Label 0 is the blank. Words are what stands between spaces.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.tasks.language_model import SPACE, LanguageModel, LanguageState

BLANK = 0
MIN_LOG_PROB = math.log(1e-4)  # labels below it are out of the question in a frame
OPEN_TOKENS = 50  # several words: how far back texts that are searched together may differ, or up to twice as far

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


# The frames spent on the tokens so far: label, start, end, sum of probabilities, and the same of the token before.
_Trace = tuple[int, int, int, float, "_Trace | None"]


class _Paths(NamedTuple):
    """Paths that spell the same and end alike.

    Attributes:
        total: log of their summed probability.
        best: log probability of the most probable one.
        trace: how that one spends its frames.
    """

    total: float
    best: float
    trace: _Trace | None


_NO_PATHS = _Paths(-math.inf, -math.inf, None)


@dataclass(slots=True, eq=False)
class _Prefix:
    """The start of a text, a node in the tree of all starts that are still in question.

    Attributes:
        label: its last one; `BLANK` at the root.
        parent: the prefix without it; None at the root.
        length: number of its labels.
        language: what the language model makes of it; None without one.
        in_blank, in_label: the paths that spell it and end in a blank, or in its last label.
        children: last label → longer prefix, of those that are searched or lead to one that is.
        is_searched: whether it is among the best.
    """

    label: int
    parent: "_Prefix | None"
    length: int
    language: LanguageState | None
    in_blank: _Paths = _NO_PATHS
    in_label: _Paths = _NO_PATHS
    children: "dict[int, _Prefix]" = field(default_factory=dict)
    is_searched: bool = True

    def score(self) -> float:
        """What it is ranked by before the text ends."""
        acoustic = _log_add(self.in_blank.total, self.in_label.total)
        return acoustic if self.language is None else acoustic + self.language.score


class _Candidate(NamedTuple):
    """A prefix longer by one label, which becomes a node if it is among the best."""

    parent: _Prefix
    label: int
    paths: _Paths
    language: LanguageState | None


def prefix_beam_search(
    log_probs: LogProbs,
    labels: Sequence[str],
    *,
    beam_width: int,
    language_model: LanguageModel | None = None,
    num_best: int = 1,
    min_log_prob: float = MIN_LOG_PROB,
) -> list[Hypothesis]:
    """Find the most probable texts, summing over the paths of each.

    Frames in which no label but the blank is possible cost nothing, so pauses are free. The times of a text are those
    of its most probable path (its Viterbi alignment), which the search carries along with the sum: memory then grows
    with the text, where an alignment of the finished text needs the product of text and frames. Of equal scores the one
    found first wins: prefixes of the frame before, then the continuation of the better one, then the lower label.

    Differs: from the papers in that texts which differ from the best one further back than `OPEN_TOKENS` are dropped:
        of a long recording, old doubts would fill the beam and leave no room for new ones. From an alignment of the
        finished text in that the search may have dropped a prefix of the best path; it then gives the best of the
        paths that it kept.

    Args:
        log_probs: (T, L) natural logarithms.
        labels: characters, in the order of the log probabilities.
        beam_width: how many prefixes are kept after each frame.
        language_model: what else decides; its score counts once a word is complete.
        num_best: how many texts are wanted.
        min_log_prob: in each frame, labels below it have no probability; at -inf nothing is left out.
    Returns: at most `num_best` texts, best first, at least one. If a closed language model completes none of those
        searched, the best one without its last, incomplete word.
    """
    root = _Prefix(BLANK, None, 0, None if language_model is None else language_model.start())
    root.in_blank = _Paths(0.0, 0.0, None)
    beam = [root]
    is_active = (log_probs[:, 1:] >= min_log_prob).any(axis=1)
    blanks = np.concatenate([[0.0], np.cumsum(log_probs[:, BLANK], dtype=np.float64)])
    done = num_settled = 0
    for frame in np.flatnonzero(is_active).tolist():
        if done < frame:
            _pause(beam, float(blanks[frame] - blanks[done]))
        row = log_probs[frame].tolist()
        possible = [label for label in range(1, len(row)) if row[label] >= min_log_prob]
        candidates = list(_extend(beam, frame, row, possible, labels=labels, language_model=language_model))
        beam = _select(beam, candidates, beam_width)
        done = frame + 1
        if beam[0].length >= num_settled + 2 * OPEN_TOKENS:
            beam = _settle(beam)
            num_settled = beam[0].length - OPEN_TOKENS
    if done < len(log_probs):
        _pause(beam, float(blanks[-1] - blanks[done]))
    return _finish(beam, labels, language_model, num_best)


def _pause(beam: list[_Prefix], log_prob: float) -> None:
    """Let frames pass that hold nothing but blanks; the order of the prefixes stays."""
    for prefix in beam:
        prefix.in_blank = _follow(_merge(prefix.in_blank, prefix.in_label), log_prob)
        prefix.in_label = _NO_PATHS


def _extend(
    beam: list[_Prefix],
    frame: int,
    row: list[float],
    possible: list[int],
    *,
    labels: Sequence[str],
    language_model: LanguageModel | None,
) -> Iterator[_Candidate]:
    """Add a frame to the prefixes of the beam, and yield those that it makes longer and that are not in the beam."""
    before = [(prefix, prefix.in_blank, _merge(prefix.in_blank, prefix.in_label)) for prefix in beam]
    for prefix, _, both in before:
        is_held = prefix.label in possible
        prefix.in_blank = _follow(both, row[BLANK])
        prefix.in_label = _hold(prefix.in_label, frame, row[prefix.label]) if is_held else _NO_PATHS
    for prefix, in_blank, both in before:
        for label in possible:
            source = in_blank if label == prefix.label else both  # without a blank between them they would be merged
            if source.total == -math.inf:
                continue
            paths = _emit(source, label, frame, row[label])
            child = prefix.children.get(label)
            if child is not None and child.is_searched:
                child.in_label = _merge(child.in_label, paths)
                continue
            language = prefix.language
            if language_model is not None and language is not None:
                language = language_model.advance(language, labels[label])
                if language is None:
                    continue
            yield _Candidate(prefix, label, paths, language)


def _select(beam: list[_Prefix], candidates: list[_Candidate], beam_width: int) -> list[_Prefix]:
    """Keep the best prefixes, old and longer ones, and forget the others."""
    ranked: list[tuple[float, _Prefix | _Candidate]] = [(prefix.score(), prefix) for prefix in beam]
    for candidate in candidates:
        language = 0.0 if candidate.language is None else candidate.language.score
        ranked.append((candidate.paths.total + language, candidate))
    ranked.sort(key=itemgetter(0), reverse=True)  # stable: ties stay in the order that `prefix_beam_search` promises
    best = [item if isinstance(item, _Prefix) else _grow(item) for _, item in ranked[:beam_width]]
    _replace(beam, best)
    return best


def _settle(beam: list[_Prefix]) -> list[_Prefix]:
    """Keep the prefixes that agree with the best one up to its last `OPEN_TOKENS` labels."""
    common = beam[0].length - OPEN_TOKENS
    anchor = _cut(beam[0], common)
    kept = [prefix for prefix in beam if _cut(prefix, common) is anchor]
    _replace(beam, kept)
    return kept


def _cut(prefix: _Prefix, length: int) -> _Prefix:
    while prefix.length > length and prefix.parent is not None:
        prefix = prefix.parent
    return prefix


def _grow(candidate: _Candidate) -> _Prefix:
    """Give a candidate its node in the tree; it may have had one before, with longer prefixes still searched."""
    node = candidate.parent.children.get(candidate.label)
    if node is None:
        node = _Prefix(candidate.label, candidate.parent, candidate.parent.length + 1, candidate.language)
        candidate.parent.children[candidate.label] = node
    node.in_blank, node.in_label = _NO_PATHS, candidate.paths
    return node


def _replace(beam: list[_Prefix], successors: list[_Prefix]) -> None:
    """Search other prefixes, and take those out of the tree that nothing searched depends on any more."""
    for prefix in beam:
        prefix.is_searched = False
    for prefix in successors:
        prefix.is_searched = True
    for prefix in beam:
        while prefix.parent is not None and not prefix.is_searched and not prefix.children:
            prefix.parent.children.pop(prefix.label, None)
            prefix = prefix.parent  # noqa: PLW2901 - climbs as far as nothing else hangs there


def _finish(
    beam: list[_Prefix], labels: Sequence[str], language_model: LanguageModel | None, num_best: int
) -> list[Hypothesis]:
    ended: list[tuple[float, _Paths]] = []
    for prefix in beam:
        paths = _merge(prefix.in_blank, prefix.in_label)
        language: float | None = 0.0
        if language_model is not None and prefix.language is not None:
            language = language_model.finish(prefix.language)
        if language is not None:
            ended.append((paths.total + language, paths))
    ended.sort(key=itemgetter(0), reverse=True)
    found = [Hypothesis(_read_trace(paths.trace), paths.total, score) for score, paths in ended[:num_best]]
    if not found:
        paths = _merge(beam[0].in_blank, beam[0].in_label)
        tokens = _read_trace(paths.trace)
        ends = [index for index, token in enumerate(tokens) if labels[token.label] == SPACE]
        found.append(Hypothesis(tokens[: ends[-1] if ends else 0], paths.total, beam[0].score()))
    _replace(beam, [])  # parents and children hold each other: taken apart here, they need no garbage collector
    return found


def _read_trace(trace: _Trace | None) -> tuple[Token, ...]:
    tokens: list[Token] = []
    while trace is not None:
        label, start, end, probability, trace = trace
        tokens.append(Token(label, start, end, probability / (end - start)))
    return tuple(reversed(tokens))


def _merge(first: _Paths, second: _Paths) -> _Paths:
    """Put together paths that spell the same; of equally probable ones the first stays the best."""
    if second.total == -math.inf:
        return first
    _, best, trace = first if first.best >= second.best else second
    return _Paths(_log_add(first.total, second.total), best, trace)


def _follow(paths: _Paths, log_prob: float) -> _Paths:
    """Add blanks."""
    return _Paths(paths.total + log_prob, paths.best + log_prob, paths.trace)


def _hold(paths: _Paths, frame: int, log_prob: float) -> _Paths:
    """Add a frame to the last token."""
    if paths.trace is None:
        return paths
    label, start, _, probability, before = paths.trace
    trace = (label, start, frame + 1, probability + math.exp(log_prob), before)
    return _Paths(paths.total + log_prob, paths.best + log_prob, trace)


def _emit(paths: _Paths, label: int, frame: int, log_prob: float) -> _Paths:
    """Add a token."""
    trace = (label, frame, frame + 1, math.exp(log_prob), paths.trace)
    return _Paths(paths.total + log_prob, paths.best + log_prob, trace)


def _log_add(first: float, second: float) -> float:
    """log(exp(first) + exp(second)), exact however small both are."""
    high, low = (first, second) if first >= second else (second, first)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
