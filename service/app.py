"""The application: routes over a catalog, opened before the first request and drained after the last."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from service.catalog import open_catalog
from service.metrics import Metrics
from service.routes.predict import make_handlers, make_predict_router
from service.routes.problems import add_error_handlers
from service.routes.shortcut import PredictionShortcut
from service.routes.status import make_status_router
from service.settings import Settings

DESCRIPTION = "Serves transformers with clustered attention. Send a file, get JSON; every error has the same shape."


def create_app(settings: Settings) -> FastAPI:
    """Open all bundles and build the application around them.

    Its `state.catalog` is what `service.__main__` drains at stop.

    Raises: BundleError if a bundle cannot be served.
    """
    metrics = Metrics()
    catalog = open_catalog(settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        catalog.start()
        yield
        await catalog.drain()
        catalog.close()

    app = FastAPI(
        title="Clustered-attention inference",
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.catalog = catalog
    add_error_handlers(app)
    handlers = make_handlers(catalog, settings)
    app.add_middleware(PredictionShortcut, handlers=handlers)
    app.include_router(make_predict_router(handlers))
    app.include_router(make_status_router(catalog, metrics))
    _add_docs(app)
    return app


def _add_docs(app: FastAPI) -> None:
    # Assets come from an installed package, so that the page works without the internet.
    app.mount("/docs/assets", StaticFiles(directory=str(files("fastapi_offline") / "static")))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon.png",
        )
