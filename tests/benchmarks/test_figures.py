import pytest

from benchmarks.figures import median_ratio, percentile


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.99) == 99.0
    assert percentile(values, 1.0) == 100.0


def test_the_percentile_of_few_values_is_not_beyond_them() -> None:
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([1.0, 2.0], 0.5) == 1.0
    assert percentile([1.0, 2.0], 0.51) == 2.0


def test_ratios_are_taken_within_a_round() -> None:
    assert median_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 3.0]) == 0.5  # the second round was ten times faster for both


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        median_ratio([1.0, 2.0], [1.0])
