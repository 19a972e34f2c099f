"""Communities one number at a time in float64.

Written from Dai et al. 2023 and the reference notes on its code, Kan et al. 2022, and Xie et al. 2016.
"""

from math import exp, log, sqrt

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


def dot(a: Array, b: Array) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def softmax(scores: list[float]) -> list[float]:
    weights = [exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def gram_schmidt(rows: Array) -> Array:
    """(C, D) → each row without what lies along those before; all but the first with length 1."""
    done: list[Array] = []
    for row in rows.astype(np.float64):
        rest = row - sum((dot(other, row) / dot(other, other) * other for other in done), start=np.zeros(len(row)))
        done.append(rest / sqrt(dot(rest, rest)) if done else rest)
    return np.array(done)


def keep_strongest(assignment: Array, num_kept: int) -> Array:
    """(N, C) → all but the largest `num_kept` of each row are 0; no ties."""
    kept = np.zeros_like(assignment)
    for n, row in enumerate(assignment):
        for c in sorted(range(len(row)), key=lambda c: -row[c])[:num_kept]:
            kept[n, c] = row[c]
    return kept


def similarity_shares(nodes: Array, centres: Array, similarity: str) -> Array:
    """(N, E), (C, E) → (N, C)."""
    rows = []
    for node in nodes:
        if similarity == "student-t":
            closeness = [1 / (1 + dot(node - centre, node - centre)) for centre in centres]
            rows.append([x / sum(closeness) for x in closeness])
        else:
            power = 2 if similarity == "squared-projection" else 1
            rows.append(softmax([dot(node, centre) ** power / sqrt(dot(centre, centre)) for centre in centres]))
    return np.array(rows)


def parameter_entropy(weight: Array) -> float:
    shares = [1 / (1 + exp(-float(w))) for w in weight.flat]
    return 0.2 * sum(-m * log(m) - (1 - m) * log(1 - m) for m in shares) / len(shares)


def sharpening_loss(shares: Array) -> float:
    """(rows, C) → mean over rows of the divergence of the sharper shares from these."""
    total = 0.0
    for row in shares:
        sharper = [q**2 / float(shares[:, c].sum()) for c, q in enumerate(row)]
        target = [x / sum(sharper) for x in sharper]
        total += sum(t * log(t / q) for t, q in zip(target, row, strict=True))
    return total / len(shares)
