"""Errors as HTTP answers: RFC 9457 `application/problem+json` with `code` and `request_id`."""

import json
import re
import secrets

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from service.errors import (
    DeviceLost,
    InternalError,
    MethodNotAllowed,
    Overloaded,
    RanksLost,
    ServiceError,
    UnknownPath,
)
from service.logs import log_request
from service.metrics import Metrics
from service.routes.headers import SECURITY_HEADERS, find_header

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 1  # of a service that is starting or stopping

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Problem(BaseModel):
    """Every answer that is not a result."""

    type: str = Field(description="Kind of problem.", examples=["about:blank"])
    title: str = Field(description="The kind in words.", examples=["Invalid input"])
    status: int = Field(description="HTTP status.", examples=[400])
    detail: str = Field(
        description="What came, what was expected, what to do.",
        examples=["top_k is 11; this model has 10 classes; ask for 1 to 10 of them"],
    )
    code: str = Field(description="For programs; stays the same between releases.", examples=["invalid_input"])
    request_id: str = Field(description="Also in the log.", examples=["8f14e45fceea467fa9b1d2c3e4f5a6b7"])


def find_request_id(request: Request) -> str:
    """Take over the client's `X-Request-Id` if it is well-formed, else make one."""
    given = find_header(request, b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def problem_response(error: ServiceError, request_id: str) -> Response:
    """Build the answer for an error."""
    headers = {"X-Request-Id": request_id}
    if error.status == 503:
        seconds = error.retry_after_seconds if isinstance(error, Overloaded | RanksLost | DeviceLost) else RETRY_SECONDS
        headers["Retry-After"] = str(seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in {408, 413}:
        headers["Connection"] = "close"  # the rest of the body is not worth reading
    body = {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": str(error),
        "code": error.code,
        "request_id": request_id,
    }
    return Response(json.dumps(body), status_code=error.status, headers=headers, media_type=MEDIA_TYPE)


def refuse(error: ServiceError, request_id: str, metrics: Metrics) -> Response:
    """Answer a request for which no model was found; count and log it."""
    metrics.count_refusal(error.code)
    log_request({"request_id": request_id, "outcome": error.code, "status": error.status})
    return problem_response(error, request_id)


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Give every error of the application, the framework's own included, the same shape."""

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        if error.status >= 500:  # what a probe of readiness is told is no refusal
            return problem_response(error, find_request_id(request))
        return refuse(error, find_request_id(request), metrics)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            fault: ServiceError = MethodNotAllowed(
                f"{request.method} is not allowed on {request.url.path[:200]}; see /docs for the method it takes"
            )
        elif error.status_code == 404:
            fault = UnknownPath(f"nothing is served under {request.url.path[:200]}; see /docs for what is")
        else:
            fault = InternalError("the service failed; try again; if it stays, tell the operator the request id")
        response = await on_service_error(request, fault)
        response.headers.update(error.headers or {})  # Allow, which RFC 9110 wants beside 405
        return response

    async def on_exception(request: Request, error: Exception) -> Response:  # noqa: ARG001 - the server logs it
        fault = InternalError("the service failed; try again; if it stays, tell the operator the request id")
        response = problem_response(fault, find_request_id(request))
        response.raw_headers += SECURITY_HEADERS  # the framework answers this one past all middleware
        return response

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_exception)
