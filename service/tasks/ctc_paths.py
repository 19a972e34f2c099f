"""Paths of CTC that spell the same, as one: their probability in all, and how the best of them spends its frames.

A search extends them frame by frame; all probabilities are natural logarithms, but for those in a trace.
"""

import math
from typing import NamedTuple

from service.tasks.ctc import Token

# The frames spent on the tokens so far: label, start, end, sum of probabilities, and the same of the token before.
Trace = tuple[int, int, int, float, "Trace | None"]


class Paths(NamedTuple):
    """Paths that spell the same and end alike.

    Attributes:
        total: log of their summed probability.
        best: log probability of the most probable one.
        trace: how that one spends its frames.
    """

    total: float
    best: float
    trace: Trace | None


NO_PATHS = Paths(-math.inf, -math.inf, None)


def merge(first: Paths, second: Paths) -> Paths:
    """Put together paths that spell the same; of equally probable ones the first stays the best."""
    if second.total == -math.inf:
        return first
    _, best, trace = first if first.best >= second.best else second
    return Paths(log_add(first.total, second.total), best, trace)


def follow(paths: Paths, log_prob: float) -> Paths:
    """Add blanks."""
    return Paths(paths.total + log_prob, paths.best + log_prob, paths.trace)


def hold(paths: Paths, frame: int, log_prob: float) -> Paths:
    """Add a frame to the last token."""
    if paths.trace is None:
        return paths
    label, start, _, probability, before = paths.trace
    trace = (label, start, frame + 1, probability + math.exp(log_prob), before)
    return Paths(paths.total + log_prob, paths.best + log_prob, trace)


def emit(paths: Paths, label: int, frame: int, log_prob: float) -> Paths:
    """Add a token."""
    trace = (label, frame, frame + 1, math.exp(log_prob), paths.trace)
    return Paths(paths.total + log_prob, paths.best + log_prob, trace)


def log_add(first: float, second: float) -> float:
    """log(exp(first) + exp(second)), exact however small both are."""
    high, low = (first, second) if first >= second else (second, first)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def read_trace(trace: Trace | None) -> tuple[Token, ...]:
    """Tokens in time, each with its frames and the mean probability over them."""
    tokens: list[Token] = []
    while trace is not None:
        label, start, end, probability, trace = trace
        tokens.append(Token(label, start, end, probability / (end - start)))
    return tuple(reversed(tokens))
