import pytest

from service import errors
from service.errors import BundleError, Overloaded, ServiceError

# The table of the HTTP interface: clients rely on it.
STATUS_AND_CODE = {
    "InvalidInput": (400, "invalid_input"),
    "MalformedRequest": (400, "malformed_request"),
    "Unauthorized": (401, "unauthorized"),
    "CrossOriginRefused": (403, "cross_origin_refused"),
    "UnknownModel": (404, "unknown_model"),
    "UnknownPath": (404, "unknown_path"),
    "MethodNotAllowed": (405, "method_not_allowed"),
    "NotAcceptable": (406, "not_acceptable"),
    "RequestTimeout": (408, "request_timeout"),
    "BodyTooLarge": (413, "body_too_large"),
    "UnsupportedMediaType": (415, "unsupported_media_type"),
    "HeadTooLarge": (431, "head_too_large"),
    "ModelFailed": (500, "model_failed"),
    "InternalError": (500, "internal_error"),
    "Overloaded": (503, "overloaded"),
    "NotReady": (503, "not_ready"),
    "RanksLost": (503, "ranks_lost"),
    "DeviceLost": (503, "device_lost"),
    "DeadlineExceeded": (504, "deadline_exceeded"),
}


def test_every_error_keeps_its_status_and_code() -> None:
    found = {error.__name__: (error.status, error.code) for error in ServiceError.__subclasses__()}
    assert found == STATUS_AND_CODE


def test_codes_and_titles_are_unique() -> None:
    kinds = ServiceError.__subclasses__()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert len({kind.title for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("name", STATUS_AND_CODE)
def test_the_tree_in_the_docstring_names_every_error(name: str) -> None:
    status, code = STATUS_AND_CODE[name]
    assert errors.__doc__ is not None
    assert any({name, str(status), code} <= set(line.split()) for line in errors.__doc__.splitlines())


def test_an_overload_says_when_to_try_again() -> None:
    error = Overloaded("the queue is full; it holds 64; try again in 2 s", retry_after_seconds=2)
    assert error.retry_after_seconds == 2
    assert str(error) == "the queue is full; it holds 64; try again in 2 s"


def test_a_bundle_error_is_no_answer_to_a_request() -> None:
    assert not issubclass(BundleError, ServiceError)
