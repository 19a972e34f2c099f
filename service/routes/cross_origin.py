"""Pages of other origins: which of them may call, and what their browsers are told.

Source: the Fetch standard, section "CORS protocol", as starlette implements it.
"""

from collections.abc import Sequence

from fastapi import Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers
from starlette.types import ASGIApp

from service.errors import CrossOriginRefused
from service.metrics import Metrics
from service.routes.headers import SECURITY_HEADERS
from service.routes.predict import TIMEOUT_HEADER
from service.routes.problems import find_request_id, refuse

METHODS = ("GET", "POST")
SENT = ("Authorization", "Content-Type", "Traceparent", "X-Request-Id", TIMEOUT_HEADER)
READ = ("Retry-After", "Server-Timing", "WWW-Authenticate", "X-Request-Id")


class CrossOrigin(CORSMiddleware):
    """ASGI middleware: lets pages of some origins call; a preflight that it refuses gets an answer like all errors.

    Args:
        app: the application.
        origins: that are let in; `*` is any.
        metrics: of the service.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str], metrics: Metrics) -> None:
        super().__init__(app, origins, METHODS, SENT, expose_headers=READ)
        self._metrics = metrics

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks before it sends; the answer's `Access-Control` headers tell it what it may."""
        response = super().preflight_response(request_headers)
        if response.status_code >= 400:
            origin, method = request_headers["origin"], request_headers["access-control-request-method"]
            headers = request_headers.get("access-control-request-headers", "no more headers")
            error = CrossOriginRefused(
                f"a page of {origin[:100]} asks to send {method[:20]} with {headers[:200]}; pages of origins that the "
                f"operator named may send {' and '.join(METHODS)} with {', '.join(SENT)}; ask the operator to name the "
                "origin in SERVICE_CORS_ORIGINS, or leave out what may not be sent"
            )
            request = Request({"type": "http", "headers": request_headers.raw})
            refused = refuse(error, find_request_id(request), self._metrics)
            refused.headers.update({name: value for name, value in response.headers.items() if _is_for_browsers(name)})
            response = refused
        response.raw_headers += SECURITY_HEADERS
        return response


def _is_for_browsers(name: str) -> bool:
    return name == "vary" or name.startswith("access-control-")
