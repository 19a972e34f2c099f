"""A ridge classifier of brain networks: the linear baseline, whose penalty is chosen within the training subjects."""

import numpy as np
import numpy.typing as npt

PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)  # as shares of the number of connections

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def classify_with_ridge(train: Values, labels: Labels, folds: Labels, test: Values) -> Values:
    """Fit one line per class to standardised connections, and score other subjects.

    Args:
        train: (N, connections).
        labels, folds: (N,); each fold in turn judges the penalties, by the squared error of what the others say of it.
        test: (M, connections).
    Returns: scores (M, L).
    """
    targets = np.eye(labels.max() + 1)[labels]
    errors = dict.fromkeys(PENALTIES, 0.0)
    for fold in np.unique(folds):
        is_kept = folds != fold
        found = solve_ridge(train[is_kept], targets[is_kept], train[~is_kept], PENALTIES)
        for penalty, scores in found.items():
            errors[penalty] += float(np.square(scores - targets[~is_kept]).sum())
    best = min(errors, key=lambda penalty: errors[penalty])
    return solve_ridge(train, targets, test, (best,))[best]


def solve_ridge(train: Values, targets: Values, test: Values, penalties: tuple[float, ...]) -> dict[float, Values]:
    """Ridge regression in its dual form, as there are fewer subjects than connections: penalty → scores (M, L).

    Args:
        train: (N, connections), made to have mean 0 and standard deviation 1; `test` (M, connections) in the same way.
        targets: (N, L).
        penalties: shares of the number of connections.
    """
    mean, std = train.mean(axis=0), train.std(axis=0)
    std[std == 0] = 1.0  # a connection that never differs says nothing
    a, b = (train - mean) / std, (test - mean) / std
    kernel, offset = a @ a.T / a.shape[1], targets.mean(axis=0)
    across = b @ a.T / a.shape[1]
    return {
        penalty: across @ np.linalg.solve(kernel + penalty * np.eye(len(kernel)), targets - offset) + offset
        for penalty in penalties
    }
