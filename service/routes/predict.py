"""The one handler that serves every task; its routes and their OpenAPI descriptions are made from `TASKS`."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from service.catalog import Catalog
from service.endpoint import Answer, Endpoint
from service.errors import DeadlineExceeded, InternalError, InvalidInput, ServiceError
from service.logs import ACCESS
from service.metrics import Metrics
from service.routes.accept import PICTURE, prefers_picture
from service.routes.access import Access
from service.routes.body import FIELD, read_file
from service.routes.problems import MEDIA_TYPE, Problem, problem_response
from service.settings import Settings
from service.tasks import TASKS
from service.tasks.task import AnyTask

if TYPE_CHECKING:
    from service.tracing import Tracing

TIMEOUT_HEADER = "X-Request-Timeout-Seconds"
CLIENT_LEFT = 499  # nginx's status for it; nobody reads the answer, only the log does

Handler = Callable[[Request], Awaitable[Response]]


def make_handlers(
    catalog: Catalog, settings: Settings, metrics: Metrics, tracing: "Tracing | None" = None
) -> dict[str, Handler]:
    """Make what answers each task, by its name."""
    return {task.name: _make_handler(task, catalog, settings, metrics, tracing) for task in TASKS.values()}


def make_predict_router(handlers: Mapping[str, Handler]) -> APIRouter:
    """Make `POST /v1/{task}` and `POST /v1/{task}/{model}` for every task.

    Args:
        handlers: name of the task → what answers it.
    """
    router = APIRouter()
    for task in TASKS.values():
        for path, parameters in ((f"/v1/{task.name}", []), (f"/v1/{task.name}/{{model}}", [_MODEL_PARAMETER])):
            router.add_api_route(
                path,
                handlers[task.name],
                methods=["POST"],
                name=task.name,
                operation_id=path.strip("/").replace("/", "-").replace("{", "").replace("}", ""),
                summary=(task.__doc__ or "").strip(),
                tags=[task.name],
                response_model=None,
                responses=_describe_responses(task),
                openapi_extra=_describe(task, parameters),
            )
    return router


def _make_handler(
    task: AnyTask, catalog: Catalog, settings: Settings, metrics: Metrics, tracing: "Tracing | None"
) -> Handler:
    async def predict(request: Request) -> Response:
        access = Access(request, task.name, metrics, tracing)
        try:
            return await _respond(request, task, catalog, settings, access)
        finally:
            access.release()

    return predict


async def _respond(request: Request, task: AnyTask, catalog: Catalog, settings: Settings, access: Access) -> Response:
    answer: Answer | None = None
    try:
        endpoint = catalog.find(task.name, request.path_params.get("model"))
        access.hold(endpoint)
        catalog.check_ready()
        answer = await _predict(request, task, endpoint, settings, access)
        response = Response(
            answer.body,
            media_type=answer.media_type,
            headers={"X-Request-Id": access.request_id, "Server-Timing": _server_timing(answer)},
        )
        outcome = "ok"
    except ServiceError as error:
        response, outcome = problem_response(error, access.request_id), error.code
    except ClientDisconnect:
        response, outcome = Response(status_code=CLIENT_LEFT), "cancelled"
    except Exception:  # noqa: BLE001 - the border of the service: clients never see internal text
        ACCESS.exception("request failed", extra={"fields": access.describe()})
        fault = InternalError("the service failed; try again; if it stays, tell the operator the request id")
        response, outcome = problem_response(fault, access.request_id), fault.code
    access.record(answer, outcome, response.status_code)
    return response


async def _predict(request: Request, task: AnyTask, endpoint: Endpoint, settings: Settings, access: Access) -> Answer:
    options = _parse_options(request, task.Options)
    timeout = _parse_timeout(request, settings.request_timeout_seconds)
    body, media_type = await read_file(
        request,
        media_types=task.media_types,
        max_bytes=endpoint.manifest.max_body_bytes,
        timeout_seconds=settings.body_timeout_seconds,
    )
    remaining = access.start + timeout - time.monotonic()
    if remaining <= 0:
        raise DeadlineExceeded(
            f"the body took longer than the {timeout:g} s that this request allows; allow more with {TIMEOUT_HEADER}"
        )
    as_picture = prefers_picture(",".join(request.headers.getlist("accept")))
    work = endpoint.predict(
        body,
        media_type,
        options,
        timeout_seconds=remaining,
        as_picture=as_picture,
        request_id=access.request_id,
        trace=access.trace,
    )
    return await _while_connected(request, work)


async def _while_connected(request: Request, work: Awaitable[Answer]) -> Answer:
    """Await work, and cancel it when the client leaves.

    Raises: ClientDisconnect, and whatever the work raises.
    """
    handler = asyncio.current_task()
    assert handler is not None, "a request is handled in a task"
    is_gone = False

    def leave(watch: "asyncio.Task[None]") -> None:
        nonlocal is_gone
        if not watch.cancelled():
            is_gone = True
            handler.cancel()

    watch = asyncio.ensure_future(_until_gone(request))
    watch.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not is_gone:
            raise
        handler.uncancel()
        raise ClientDisconnect from None
    finally:
        watch.remove_done_callback(leave)
        watch.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parse_options(request: Request, options: type[BaseModel]) -> BaseModel:
    given = request.query_params
    known = f"this task takes {', '.join(options.model_fields) or 'no options'}"
    for name in given:
        if name not in options.model_fields:
            raise InvalidInput(f"option {name[:40]!r} is unknown; {known}; leave it out, or correct its name")
        if len(given.getlist(name)) > 1:
            raise InvalidInput(
                f"option {name} comes {len(given.getlist(name))} times; it was expected once; choose one"
            )
    try:
        return options.model_validate(dict(given))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in fault["loc"])[:40]
        raise InvalidInput(
            f"option {name} is {str(fault['input'])[:40]!r}; {fault['msg'][:1].lower()}{fault['msg'][1:]}; {known}"
        ) from error


def _parse_timeout(request: Request, longest: float) -> float:
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return longest
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise InvalidInput(f"{TIMEOUT_HEADER} is {given[:40]!r}; seconds above 0 were expected; send a number like 2.5")
    return min(seconds, longest)


def _server_timing(answer: Answer) -> str:
    return ", ".join(f"{stage};dur={seconds * 1e3:.2f}" for stage, seconds in answer.times.items())


_MODEL_PARAMETER = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "Name of the model, as `GET /v1/models` lists it.",
    "schema": {"type": "string"},
}
_PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}}
    for status, description in {
        400: "The input or an option cannot be used.",
        401: "A key is needed, and none came or an unknown one.",
        404: "No such model.",
        406: "A picture is wanted, and there is nothing to draw.",
        408: "The body, or the whole of the headers, did not arrive in time.",
        413: "The body is too large.",
        415: "The body is of a type that this task does not read.",
        431: "The path, the query and the headers are too large.",
        500: "The model or the service failed.",
        503: "The queue is full, the service is stopping, or what runs the model was lost; see Retry-After.",
        504: "The deadline passed.",
    }.items()
}


def _describe_responses(task: AnyTask) -> dict[int | str, dict[str, Any]]:
    """Describe the answers; pictures only where the task draws."""
    answer: dict[str, Any] = {"model": task.Result, "description": "The answer."}
    if not task.drawing:
        return {200: answer} | {status: one for status, one in _PROBLEM_RESPONSES.items() if status != 406}
    schema = {"type": "string", "format": "binary", "description": task.drawing}
    return {200: answer | {"content": {PICTURE: {"schema": schema}}}} | _PROBLEM_RESPONSES


def _describe(task: AnyTask, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe what the handler reads by itself: options, the timeout, the body."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"type": "object", "required": [FIELD], "properties": {FIELD: {"type": "string", "format": "binary"}}}
    options = [
        {"name": name, "in": "query", "required": False, "description": schema.pop("description", ""), "schema": schema}
        for name, schema in task.Options.model_json_schema().get("properties", {}).items()
    ]
    timeout = {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "required": False,
        "description": "After how many seconds nobody wants the answer; work on it is then dropped.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "examples": [2.5]},
    }
    content = dict.fromkeys((*sorted(task.media_types), "application/octet-stream"), binary)
    return {
        "parameters": [*parameters, *options, timeout],
        "requestBody": {"required": True, "content": {**content, "multipart/form-data": {"schema": form}}},
    }
