import json
import logging
import sys

import pytest

from service.logs import ACCESS, JsonFormatter, configure_logs


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
