import numpy as np

from benchmarks.ridge import PENALTIES, classify_with_ridge, solve_ridge

RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.standard_normal((40, 15)), RNG.standard_normal((10, 15))
TARGETS = RNG.standard_normal((40, 2))


def test_the_dual_solution_is_the_primal_one() -> None:
    mean, std = TRAIN.mean(axis=0), TRAIN.std(axis=0)
    a, b = (TRAIN - mean) / std, (TEST - mean) / std
    found = solve_ridge(TRAIN, TARGETS, TEST, (0.3, 3.0))
    for penalty, scores in found.items():
        weights = np.linalg.solve(a.T @ a + penalty * 15 * np.eye(15), a.T @ (TARGETS - TARGETS.mean(axis=0)))
        np.testing.assert_allclose(scores, b @ weights + TARGETS.mean(axis=0), rtol=0, atol=1e-9)


def test_a_connection_that_never_differs_changes_nothing() -> None:
    wide = np.hstack([TRAIN, np.ones((40, 15))]), np.hstack([TEST, np.full((10, 15), 9.0)])
    narrow = solve_ridge(TRAIN, TARGETS, TEST, (1.0,))[1.0]
    # Penalties are shares of the number of connections, of which there are twice as many.
    np.testing.assert_allclose(solve_ridge(wide[0], TARGETS, wide[1], (0.5,))[0.5], narrow, rtol=0, atol=1e-9)


def test_the_penalty_is_the_one_that_the_other_folds_say_is_best() -> None:
    folds, labels = np.arange(40) % 4, (TRAIN[:, 0] + 3 * RNG.standard_normal(40) > 0).astype(np.int64)
    targets = np.eye(2)[labels]
    errors = []
    for penalty in PENALTIES:
        error = 0.0
        for fold in range(4):
            out = folds == fold
            error += np.square(
                solve_ridge(TRAIN[~out], targets[~out], TRAIN[out], (penalty,))[penalty] - targets[out]
            ).sum()
        errors.append(error)
    best = PENALTIES[int(np.argmin(errors))]
    found = classify_with_ridge(TRAIN, labels, folds, TEST)
    np.testing.assert_allclose(found, solve_ridge(TRAIN, targets, TEST, (best,))[best], rtol=0, atol=1e-12)
