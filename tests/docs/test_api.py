"""Holds docs/api.md to the routes and the error codes of the service."""

from service import errors
from service.app import create_app
from service.settings import Settings
from service.tasks import TASKS
from tests.docs.repository import document, is_named

# Answers that are no JSON may be left out of the OpenAPI description, never out of the documentation.
NOT_IN_OPENAPI = {"/metrics", "/docs"}


def error_codes() -> set[str]:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    return {code for code in (getattr(one, "code", None) for one in classes) if code}


def test_every_error_code_is_documented() -> None:
    text = document("docs/api.md")
    codes = error_codes()
    assert codes
    assert {code for code in codes if not is_named(code, text)} == set()


def test_every_route_is_documented() -> None:
    text = document("docs/api.md")
    paths = set(create_app(Settings()).openapi()["paths"])
    assert paths
    paths |= NOT_IN_OPENAPI
    # One handler serves all tasks, so a route may be documented once, with {task} in the place of the task's name.
    general = {path: {path} | {path.replace(f"/{task}", "/{task}") for task in TASKS} for path in paths}
    assert {path for path in paths if not any(is_named(name, text) for name in general[path])} == set()
