import itertools

import pytest

from training.error_rate import ErrorCount, count_errors


@pytest.mark.parametrize(
    ("said", "found", "num_errors"),
    [
        ("ONE TWO", "ONE TWO", 0),
        ("ONE TWO", "ONE", 1),
        ("ONE TWO", "ONE TWO TWO", 1),
        ("ONE TWO", "FIVE TWO", 1),
        ("ONE TWO THREE", "TWO THREE ONE", 2),
        ("", "ONE", 1),
        ("ONE", "", 1),
        ("", "", 0),
    ],
)
def test_errors_are_the_fewest_edits(said: str, found: str, num_errors: int) -> None:
    assert count_errors(said.split(), found.split()) == ErrorCount(num_errors, len(said.split()))


def test_the_count_is_that_of_trying_every_alignment() -> None:
    def brute(said: str, found: str) -> int:
        if not said or not found:
            return max(len(said), len(found))
        return min(
            brute(said[1:], found[1:]) + (said[0] != found[0]), brute(said[1:], found) + 1, brute(said, found[1:]) + 1
        )

    texts = ["".join(text) for size in range(4) for text in itertools.product("ab", repeat=size)]
    for said, found in itertools.product(texts, texts):
        assert count_errors(said, found).num_errors == brute(said, found)


def test_counts_add_up_before_they_are_divided() -> None:
    total = count_errors(["A", "B", "C"], ["A"]) + count_errors(["D"], ["D"])
    assert total == ErrorCount(2, 4)
    assert total.rate == 0.5
    assert count_errors([], ["A", "B"]).rate == 2.0
