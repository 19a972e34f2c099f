"""Prefix beam search: log probabilities of labels, frame by frame → the most probable texts.

Source: Hannun et al. 2014 (first-pass large vocabulary continuous speech recognition), algorithm 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from service.tasks.ctc import BLANK, Hypothesis, LogProbs
from service.tasks.ctc_paths import NO_PATHS, Paths, emit, follow, hold, log_add, merge, read_trace
from service.tasks.language_model import SPACE, LanguageModel, LanguageState

MIN_LOG_PROB = math.log(1e-4)  # labels below it are out of the question in a frame
OPEN_TOKENS = 50  # several words: how far back texts that are searched together may differ, or up to twice as far


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
    in_blank: Paths = NO_PATHS
    in_label: Paths = NO_PATHS
    children: "dict[int, _Prefix]" = field(default_factory=dict)
    is_searched: bool = True

    def score(self) -> float:
        """What it is ranked by before the text ends."""
        acoustic = log_add(self.in_blank.total, self.in_label.total)
        return acoustic if self.language is None else acoustic + self.language.score


class _Candidate(NamedTuple):
    """A prefix longer by one label, which becomes a node if it is among the best."""

    parent: _Prefix
    label: int
    paths: Paths
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
    root.in_blank = Paths(0.0, 0.0, None)
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
        prefix.in_blank = follow(merge(prefix.in_blank, prefix.in_label), log_prob)
        prefix.in_label = NO_PATHS


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
    before = [(prefix, prefix.in_blank, merge(prefix.in_blank, prefix.in_label)) for prefix in beam]
    for prefix, _, both in before:
        is_held = prefix.label in possible
        prefix.in_blank = follow(both, row[BLANK])
        prefix.in_label = hold(prefix.in_label, frame, row[prefix.label]) if is_held else NO_PATHS
    for prefix, in_blank, both in before:
        for label in possible:
            source = in_blank if label == prefix.label else both  # without a blank between them they would be merged
            if source.total == -math.inf:
                continue
            paths = emit(source, label, frame, row[label])
            child = prefix.children.get(label)
            if child is not None and child.is_searched:
                child.in_label = merge(child.in_label, paths)
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
    node.in_blank, node.in_label = NO_PATHS, candidate.paths
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
    ended: list[tuple[float, Paths]] = []
    for prefix in beam:
        paths = merge(prefix.in_blank, prefix.in_label)
        language: float | None = 0.0
        if language_model is not None and prefix.language is not None:
            language = language_model.finish(prefix.language)
        if language is not None:
            ended.append((paths.total + language, paths))
    ended.sort(key=itemgetter(0), reverse=True)
    found = [Hypothesis(read_trace(paths.trace), paths.total, score) for score, paths in ended[:num_best]]
    if not found:
        paths = merge(beam[0].in_blank, beam[0].in_label)
        tokens = read_trace(paths.trace)
        ends = [index for index, token in enumerate(tokens) if labels[token.label] == SPACE]
        found.append(Hypothesis(tokens[: ends[-1] if ends else 0], paths.total, beam[0].score()))
    _replace(beam, [])  # parents and children hold each other: taken apart here, they need no garbage collector
    return found
