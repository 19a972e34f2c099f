from typing import Any

import pytest
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from service.routes.shortcut import PredictionShortcut


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("application")(scope, receive, send)


async def handler(request: Request) -> Response:
    return Response(f"handler {request.path_params}")


async def ask(scope: dict[str, Any]) -> bytes:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    shortcut = PredictionShortcut(application, handlers={"image-classification": handler})
    await shortcut({"type": "http", "method": "POST", "headers": [], "query_string": b"", **scope}, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "parameters"),
    [("/v1/image-classification", {}), ("/v1/image-classification/some-model", {"model": "some-model"})],
)
async def test_a_prediction_goes_straight_to_its_handler(path: str, parameters: dict[str, str]) -> None:
    assert await ask({"path": path}) == f"handler {parameters}".encode()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "scope",
    [
        {"path": "/v1/image-classification", "method": "GET"},
        {"path": "/v1/image-classification/"},
        {"path": "/v1/image-classification/a/b"},
        {"path": "/v1/image-classification-2"},
        {"path": "/v1/models"},
        {"path": "/image-classification"},
        {"path": "/"},
    ],
)
async def test_everything_else_goes_to_the_application(scope: dict[str, Any]) -> None:
    assert await ask(scope) == b"application"
