import json

import pytest

from benchmarks.client import Answer
from benchmarks.quality import score


def answer(index: int) -> Answer:
    return Answer(200, b"", json.dumps({"predictions": [{"index": index}, {"index": 9}]}).encode())


def test_only_the_first_prediction_counts() -> None:
    assert score([answer(3), answer(1), answer(0), answer(9)], [3, 9, 0, 9]) == 0.75


@pytest.mark.parametrize("lost", [None, Answer(503, b"", b"{}")])
def test_a_picture_without_a_result_is_no_wrong_answer_but_a_failed_measurement(lost: Answer | None) -> None:
    with pytest.raises(ValueError, match="1 of 2 pictures"):
        score([answer(3), lost], [3, 3])
