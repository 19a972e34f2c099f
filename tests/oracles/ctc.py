"""CTC by listing every path, one number at a time in float64.

Written from Graves et al. 2006: a path names one label for each frame; its labelling merges repeated labels and then
drops blanks, label 0; the probability of a labelling is the sum over its paths.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from math import exp

import numpy as np
import numpy.typing as npt

Labels = tuple[int, ...]


def collapse(path: Labels) -> Labels:
    merged = [label for position, label in enumerate(path) if position == 0 or label != path[position - 1]]
    return tuple(label for label in merged if label != 0)


def paths(log_probs: npt.NDArray[np.floating]) -> Iterator[tuple[Labels, float]]:
    """log_probs: (T, L) → each of the L ** T paths with its probability."""
    T, L = log_probs.shape
    for path in product(range(L), repeat=T):
        yield path, exp(sum(float(log_probs[t, label]) for t, label in enumerate(path)))


def labelling_probabilities(log_probs: npt.NDArray[np.floating]) -> dict[Labels, float]:
    """Each labelling → the sum over its paths."""
    found: dict[Labels, float] = defaultdict(float)
    for path, probability in paths(log_probs):
        found[collapse(path)] += probability
    return dict(found)


def best_path(log_probs: npt.NDArray[np.floating], labels: Labels) -> Labels:
    """The most probable path of a labelling."""
    return max((pair for pair in paths(log_probs) if collapse(pair[0]) == labels), key=lambda pair: pair[1])[0]


def token_spans(path: Labels) -> list[tuple[int, int, int]]:
    """Label, first frame and the frame after the last, of each token of a path."""
    spans: list[tuple[int, int, int]] = []
    for frame, label in enumerate(path):
        if label == 0:
            continue
        if frame and path[frame - 1] == label:
            spans[-1] = (label, spans[-1][1], frame + 1)
        else:
            spans.append((label, frame, frame + 1))
    return spans
