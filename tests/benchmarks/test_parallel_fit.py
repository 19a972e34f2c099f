import re
from collections.abc import Sequence

import pytest

from benchmarks.parallel_fit import Row, count_pairs, fit, main, predict_training
from benchmarks.parallel_paper import TRAINED
from tests.docs.repository import document


def row(measured: float, predicted: float, *, is_fitted: bool = True, group: str = "a") -> Row:
    return Row(group=group, name="", measured=measured, predicted=predicted, is_fitted=is_fitted)


def test_a_fit_finds_the_numbers_behind_fitted_rows_and_leaves_what_they_do_not_tell() -> None:
    def predict(numbers: Sequence[float]) -> list[Row]:
        a, b, _ = numbers
        rows = [row(3.0 + 0.5 * x, a + b * x) for x in range(8)]
        return [*rows, row(100.0, a, is_fitted=False)]

    assert fit(predict, [1.0, 1.0, 7.0]) == pytest.approx([3.0, 0.5, 7.0], rel=0.01)


def test_pairs_are_counted_within_a_group_and_only_where_they_differ() -> None:
    rows = [row(1, 1), row(2, 3), row(3, 2), row(3.01, 9), row(50, 0, group="b")]
    assert count_pairs(rows) == (4, 5)


def test_every_row_of_the_papers_training_has_a_prediction_of_its_size() -> None:
    rows = predict_training(TRAINED, [200, 160, 200, 25, 0.1])
    assert len(rows) == 9 + 11 + 11 + 4 + 5 + 8
    assert all(0.5 < one.predicted / one.measured < 2 for one in rows)


def test_the_document_says_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out
    text = document("docs/parallel.md")
    said = [line for line in printed.splitlines() if "median error" in line or line.startswith("Fitted")]
    assert len(said) >= 10
    assert [line for line in dict.fromkeys(said) if line not in text] == []
    quoted = [line for line in printed.splitlines() if re.match(r"\| [\d.]+ and ", line)]
    assert quoted
    assert [line for line in quoted if line not in text] == []
