"""The way to a prediction: past the framework's middleware and routing, which cost time on every request."""

from collections.abc import Mapping

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.routes.headers import SECURITY_HEADERS
from service.routes.predict import Handler

PREFIX = "/v1/"


class PredictionShortcut:
    """ASGI middleware: `POST /v1/{task}[/{model}]` goes straight to the task's handler, all else to the application.

    The handlers read the request and answer every error by themselves, so nothing of the framework is missed. The
    application has routes to the same handlers: they are described by OpenAPI and answer what does not come this way,
    such as other methods.

    Args:
        app: the application.
        handlers: name of the task → what answers it.
    """

    def __init__(self, app: ASGIApp, *, handlers: Mapping[str, Handler]) -> None:
        self._app, self._handlers = app, handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection's request."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].startswith(PREFIX):
            task, slash, model = scope["path"].removeprefix(PREFIX).partition("/")
            handler = self._handlers.get(task)
            if handler is not None and bool(model) == bool(slash) and "/" not in model:
                scope["path_params"] = {"model": model} if model else {}
                response = await handler(Request(scope, receive, send))
                response.raw_headers += SECURITY_HEADERS
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
