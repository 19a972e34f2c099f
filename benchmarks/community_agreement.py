"""How far two partitions of the same regions agree: adjusted Rand index and normalised mutual information; k-means."""

import numpy as np
import numpy.typing as npt

NUM_STARTS, NUM_ITERATIONS = 10, 50

Values = npt.NDArray[np.float64]
Parts = npt.NDArray[np.int64]


def adjusted_rand(one: Parts, two: Parts) -> float:
    """Share of the pairs on which two partitions agree, so that chance gives 0 and equality 1.

    Args:
        one, two: (R,), the part of each region.
    Source: Hubert and Arabie 1985. Two partitions into one part, or into single regions, are equal: 1.
    """
    table = _count(one, two)
    together = _pairs(table).sum()
    of_one, of_two = _pairs(table.sum(axis=1)).sum(), _pairs(table.sum(axis=0)).sum()
    expected = of_one * of_two / _pairs(table.sum())
    most = (of_one + of_two) / 2
    return 1.0 if most == expected else float((together - expected) / (most - expected))


def normalised_mutual_information(one: Parts, two: Parts) -> float:
    """Mutual information of two partitions over the mean of their entropies, in [0, 1]; 0 where one has one part only.

    Args:
        one, two: (R,), the part of each region.
    """
    joint = _count(one, two) / len(one)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    is_there = joint > 0
    information = (joint[is_there] * np.log(joint[is_there] / independent[is_there])).sum()
    entropy = (_entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0))) / 2
    return float(information / entropy) if entropy else 0.0


def cluster_rows(rows: Values, num_clusters: int, *, seed: int) -> Parts:
    """Lloyd's k-means, the best of ten random starts: the cluster of each row, (R,).

    Args:
        rows: (R, D).
        num_clusters: at most R.
        seed: of the starts.
    """
    rng = np.random.default_rng(seed)
    best, least = np.zeros(len(rows), np.int64), np.inf
    for _ in range(NUM_STARTS):
        centres = rows[rng.choice(len(rows), num_clusters, replace=False)]
        for _ in range(NUM_ITERATIONS):
            # Without the square of the row, which is the same for all centres.
            distances = np.square(centres).sum(axis=1) - 2 * rows @ centres.T
            found = distances.argmin(axis=1)
            centres = np.stack(
                [rows[found == c].mean(axis=0) if (found == c).any() else centres[c] for c in range(num_clusters)]
            )
        if (error := distances.min(axis=1).sum()) < least:
            best, least = found.astype(np.int64), error
    return best


def _count(one: Parts, two: Parts) -> Values:
    """Regions in each part of one and each part of the other."""
    rows, columns = (np.unique(parts, return_inverse=True)[1] for parts in (one, two))
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    return table


def _pairs(number: Values) -> Values:
    return number * (number - 1) / 2


def _entropy(shares: Values) -> float:
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
