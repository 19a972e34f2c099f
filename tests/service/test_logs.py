import json
import logging
import sys

import pytest

from service.logs import (
    ACCESS,
    BURST,
    LINES_PER_SECOND,
    JsonFormatter,
    Throttle,
    configure_logs,
    find_trace_id,
    log_request,
)


def make_record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("service.access", logging.INFO, "file.py", 1, message, args, None)
    if fields:
        record.fields = fields
    return record


def test_a_record_is_one_json_line_with_its_fields() -> None:
    text = JsonFormatter().format(make_record("request", outcome="ok", status=200, seconds=0.25))
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("info", "service.access", "request")
    assert (line["outcome"], line["status"], line["seconds"]) == ("ok", 200, 0.25)
    assert line["time"].endswith("+00:00")


def test_arguments_become_part_of_the_message() -> None:
    assert json.loads(JsonFormatter().format(make_record("%d of %s", 3, "four")))["message"] == "3 of four"


def test_whatever_a_message_holds_it_stays_one_line() -> None:
    text = JsonFormatter().format(make_record('a\nb"\r\x00', path="c\nd"))
    assert len(text.splitlines()) == 1
    assert json.loads(text)["message"] == 'a\nb"\r\x00'


def test_a_traceback_is_part_of_the_line() -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        record = make_record("request failed")
        record.exc_info = sys.exc_info()
    text = JsonFormatter().format(record)
    assert len(text.splitlines()) == 1
    assert "RuntimeError: broken" in json.loads(text)["traceback"]


def test_a_field_that_json_does_not_know_is_written_as_text() -> None:
    assert json.loads(JsonFormatter().format(make_record("request", cause=KeyError("x"))))["cause"] == "'x'"


def test_logs_go_to_standard_output_from_the_level_on(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("warning")
    logging.getLogger("service").info("quiet")
    ACCESS.warning("loud", extra={"fields": {"status": 500}})
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": "service.access",
        "message": "loud",
        "status": 500,
    }


# Floods


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def refused() -> logging.LogRecord:
    return make_record("request", outcome="unauthorized", status=401)


def failed(name: str = "service.batcher") -> logging.LogRecord:
    return logging.LogRecord(name, logging.ERROR, "file.py", 1, "batch failed", (), None)


def test_a_flood_of_refusals_is_cut_and_the_next_line_tells_of_it() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    passed = [throttle.filter(refused()) for _ in range(1000)]
    assert passed == [True] * int(BURST) + [False] * (1000 - int(BURST))
    clock.now = 1.0
    later = [refused() for _ in range(100)]
    assert [throttle.filter(record) for record in later].count(True) == LINES_PER_SECOND
    assert later[0].fields == {"outcome": "unauthorized", "status": 401, "suppressed": 1000 - int(BURST)}
    assert "suppressed" not in later[1].fields
    clock.now = 1000.0
    assert [throttle.filter(refused()) for _ in range(1000)].count(True) == BURST


def test_a_flood_of_refusals_hides_no_failure_and_no_success() -> None:
    throttle = Throttle(Clock())
    for _ in range(1000):
        throttle.filter(refused())
        throttle.filter(failed("uvicorn.error"))
    assert not throttle.filter(refused())
    assert throttle.filter(failed())
    assert all(throttle.filter(make_record("request", outcome="ok")) for _ in range(1000))
    assert throttle.filter(make_record("endpoint opened"))


def test_the_log_of_a_flood_is_bounded(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info")
    for _ in range(2000):
        log_request({"outcome": "invalid_input"})
    log_request({"outcome": "ok"})
    lines = capsys.readouterr().out.splitlines()
    assert BURST <= len(lines) < 2000  # a slow machine takes a moment for them, in which some more may pass
    assert json.loads(lines[-1])["outcome"] == "ok"


# Traces


def test_a_well_formed_traceparent_names_its_trace() -> None:
    given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert find_trace_id(given) == "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    "given",
    [
        "",
        "4bf92f3577b34da6a3ce929d0e0e4736",
        "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
    ],
)
def test_any_other_traceparent_is_left_out(given: str) -> None:
    assert find_trace_id(given) is None
