"""The application: routes over a catalog, opened before the first request and drained after the last."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import FastAPI, Security
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from service.catalog import Catalog, open_catalog
from service.devices import open_devices
from service.errors import SettingError
from service.keys import ApiKeys
from service.metrics import Metrics
from service.reload import Reloader
from service.routes.admin import make_admin_router
from service.routes.connections import make_connection
from service.routes.cross_origin import CrossOrigin
from service.routes.guard import BEARER, KeyGuard
from service.routes.headers import DOCS, SecurityHeaders, make_docs_headers, render_docs
from service.routes.predict import make_handlers, make_predict_router
from service.routes.problems import add_error_handlers
from service.routes.shortcut import PredictionShortcut
from service.routes.status import make_health_router, make_metrics_router, make_models_router
from service.settings import Settings

if TYPE_CHECKING:
    from service.tracing import Tracing

TITLE = "Clustered-attention inference"
DESCRIPTION = "Serves transformers with clustered attention. Send a file, get JSON; every error has the same shape."


def create_app(settings: Settings) -> FastAPI:
    """Open all bundles and build the application around them.

    Its `state` has what `service.__main__` needs: the `catalog`, to be drained at stop; `connection`, which the server
    makes for every client; and `metrics_app`, which answers at the port for metrics, if there is one.

    Raises: BundleError if a bundle cannot be served; SettingError if a setting names what cannot be used.
    """
    keys = ApiKeys(settings.api_keys_file) if settings.api_keys_file is not None else None
    tracing = _open_tracing(settings.otlp_endpoint) if settings.otlp_endpoint is not None else None
    metrics = Metrics()
    catalog = open_catalog(settings, metrics)
    if devices := open_devices():
        metrics.watch(devices)
    reloader = Reloader(catalog, keys, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        catalog.start()
        watch = asyncio.ensure_future(reloader.watch()) if settings.watch_seconds else None
        yield
        if watch is not None:
            watch.cancel()
        await catalog.drain()
        catalog.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title=TITLE,
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # curl would show the empty body of a redirect, and nothing of what is wrong
    )
    app.state.catalog = catalog
    app.state.metrics_app = _create_metrics_app(catalog, metrics) if settings.metrics_port else None
    app.state.connection = make_connection(metrics)
    add_error_handlers(app, metrics)
    handlers = make_handlers(catalog, settings, metrics, tracing)
    for router in (make_predict_router(handlers), make_models_router(catalog)):
        app.include_router(router, dependencies=[Security(BEARER)] if keys is not None else None)
    app.include_router(make_admin_router(reloader, keys))
    app.include_router(make_health_router(catalog))
    if not settings.metrics_port:
        app.include_router(make_metrics_router(metrics))
    page = _add_docs(app)
    # The last one added is the first one that a request meets.
    app.add_middleware(SecurityHeaders, docs_headers=make_docs_headers(page))
    app.add_middleware(PredictionShortcut, handlers=handlers)
    if keys is not None:
        app.add_middleware(KeyGuard, keys=keys, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(CrossOrigin, origins=settings.cors_origins, metrics=metrics)
    return app


def _create_metrics_app(catalog: Catalog, metrics: Metrics) -> FastAPI:
    """Build what answers at a port of its own."""
    app = FastAPI(title=TITLE, version="1", openapi_url=None, redirect_slashes=False)
    add_error_handlers(app, metrics)
    app.include_router(make_health_router(catalog))
    app.include_router(make_metrics_router(metrics))
    app.add_middleware(SecurityHeaders)
    return app


def _open_tracing(endpoint: str) -> "Tracing":
    try:
        from service.tracing import open_tracing  # noqa: PLC0415 - a service without traces needs no OpenTelemetry
    except ImportError as error:
        raise SettingError(
            f"SERVICE_OTLP_ENDPOINT is set, but {error.name} is not installed; install requirements/tracing.txt or "
            "unset it"
        ) from error
    return open_tracing(endpoint)


class _Assets(StaticFiles):
    """The files of the page; always whole, as a part that cannot be had would be refused in words of the framework."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name not in {b"range", b"if-range"}]
        await super().__call__({**scope, "headers": headers}, receive, send)


def _add_docs(app: FastAPI) -> str:
    app.mount(f"{DOCS}/assets", _Assets(directory=str(files("fastapi_offline") / "static")))
    page = render_docs(TITLE)

    @app.get(DOCS, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page)

    return page
