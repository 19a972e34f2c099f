from benchmarks.client import Answer
from benchmarks.robustness import Robustness, Tally, render_robustness, tally


def answer(status: int, head: bytes = b"http/1.1\r\n") -> Answer:
    return Answer(status, head, b"")


def test_answers_are_counted_by_status_and_refusals_must_say_when_to_come_back() -> None:
    answers = [answer(200), answer(503, b"http/1.1 503\r\nretry-after: 1\r\n"), None, answer(200), answer(503)]
    assert tally(answers, 1.5) == Tally(statuses={0: 1, 200: 2, 503: 2}, num_without_retry=1, seconds=1.5)


def test_a_tally_becomes_a_row() -> None:
    one = Tally(statuses={200: 3, 503: 2}, num_without_retry=1, seconds=0.25)
    text = render_robustness(Robustness(good=one, bad=one, crowd=one, after=one))
    assert text.count("| 3 x 200, 2 x 503 | 1 | 0.25 |") == 4
