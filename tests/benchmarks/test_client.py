import pytest

from benchmarks.client import build_request, parse_answer

ANSWER = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\nRetry-After: 2\r\n\r\nhello"


def test_a_request_announces_its_length() -> None:
    request = build_request("/predict", b"\xff\xd8\xff", media_type="image/jpeg")
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /predict HTTP/1.1\r\n")
    assert b"\r\nContent-Length: 3\r\n" in head
    assert body == b"\xff\xd8\xff"


@pytest.mark.parametrize("cut", range(len(ANSWER)))
def test_an_answer_is_there_once_its_last_byte_is(cut: int) -> None:
    assert parse_answer(ANSWER[:cut]) is None


def test_an_answer_has_its_status_headers_and_body() -> None:
    answer = parse_answer(ANSWER)
    assert answer is not None
    assert (answer.status, answer.body) == (503, b"hello")
    assert b"\r\nretry-after: 2\r\n" in answer.head


def test_an_answer_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Content-Length"):
        parse_answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
