"""Who gets in: requests without a key are answered before anything of them is read."""

from fastapi import Request
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unauthorized
from service.keys import ApiKeys
from service.metrics import Metrics
from service.routes.headers import DOCS, SECURITY_HEADERS, find_header
from service.routes.problems import find_request_id, refuse

# What tells nothing of models and their answers; all else, whatever it is, needs a key.
OPEN = ("/health/live", "/health/ready", "/metrics", "/openapi.json", DOCS)
OPEN_PREFIX = f"{DOCS}/"

# For the description of the interface alone: the guard decides.
BEARER = HTTPBearer(auto_error=False, description="An API key.")


class KeyGuard:
    """ASGI middleware: lets in who has a key.

    It stands before `PredictionShortcut`, so that no way leads past it.

    Args:
        app: the application.
        keys: that are let in.
        metrics: of the service.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys, metrics: Metrics) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection's request."""
        if scope["type"] == "http" and not is_open(scope["path"]):
            request = Request(scope)
            try:
                check_key(self._keys, request)
            except Unauthorized as error:
                response = refuse(error, find_request_id(request), self._metrics)
                response.raw_headers += SECURITY_HEADERS
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether a path is for everybody."""
    return path in OPEN or path.startswith(OPEN_PREFIX)


def check_key(keys: ApiKeys | None, request: Request) -> None:
    """Let in who has a key.

    Raises: Unauthorized, also where there are no keys.
    """
    if keys is None:
        raise Unauthorized(
            "this service has no API keys; this path is for whoever has one; set SERVICE_API_KEYS_FILE to use it"
        )
    keys.check(find_header(request, b"authorization"))
