import numpy as np
import pytest

from benchmarks.community_agreement import adjusted_rand, cluster_rows, normalised_mutual_information

ONE = np.array([0, 0, 0, 1, 1, 1])
TWO = np.array([0, 0, 1, 1, 2, 2])


def test_agreement_is_that_of_the_worked_example() -> None:
    # Pairs together in both: 2; in one: 6; in two: 3; of 15. (2 - 18/15) / (4.5 - 18/15) = 8/33.
    assert adjusted_rand(ONE, TWO) == pytest.approx(8 / 33)
    # Information ln 2 - 1/3 ln 2 = 2/3 ln 2; entropies ln 2 and ln 3.
    expected = (2 / 3 * np.log(2)) / ((np.log(2) + np.log(3)) / 2)
    assert normalised_mutual_information(ONE, TWO) == pytest.approx(expected)


def test_names_of_parts_and_order_of_partitions_do_not_count() -> None:
    renamed = np.array([7, 7, 7, 2, 2, 2])
    assert adjusted_rand(ONE, renamed) == normalised_mutual_information(ONE, renamed) == pytest.approx(1.0)
    assert adjusted_rand(TWO, ONE) == pytest.approx(adjusted_rand(ONE, TWO))


def test_one_part_for_all_tells_nothing() -> None:
    assert adjusted_rand(ONE, np.zeros(6, int)) == 0.0
    assert normalised_mutual_information(ONE, np.zeros(6, int)) == 0.0
    assert adjusted_rand(np.zeros(6, int), np.zeros(6, int)) == 1.0


def test_chance_agrees_by_nothing_in_the_mean() -> None:
    rng = np.random.default_rng(0)
    parts = np.repeat(np.arange(5), 8)
    found = [adjusted_rand(parts, rng.permutation(parts)) for _ in range(200)]
    assert abs(np.mean(found)) < 0.01  # standard error about 0.002


def test_k_means_finds_heaps_that_anyone_can_see() -> None:
    rng = np.random.default_rng(1)
    parts = np.repeat(np.arange(3), 10)
    rows = 10.0 * np.eye(3)[parts] + rng.standard_normal((30, 3))
    assert adjusted_rand(cluster_rows(rows, 3, seed=0), parts) == 1.0
