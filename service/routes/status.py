"""What the service says about itself: models, health, metrics."""

from typing import Any, Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from service.bundle import Precision
from service.catalog import Catalog
from service.endpoint import Endpoint
from service.metrics import Metrics
from service.routes.problems import MEDIA_TYPE, Problem

_UNKNOWN: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "No such model.", "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}}
}
_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {
        "description": "Starting, stopping, or a model has no device left.",
        "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
    }
}


class ModelEntry(BaseModel):
    """A served model; OpenAI clients read the first four fields."""

    id: str = Field(examples=["paca-vit-micro-cifar10"])
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970.")
    owned_by: str
    task: str = Field(examples=["image-classification"])
    version: str = Field(examples=["1.0.0"])
    default: bool = Field(description="Whether it answers where a request names no model.")
    runtime: str = Field(examples=["onnx"])
    device: str = Field(description="What really runs it.", examples=["cpu"])
    kernel: str = Field(description="portable, or native where a kernel of ours runs.", examples=["portable"])
    precision: Precision = Field(description="What the program computes in; fp16 is mixed.")


class ModelList(BaseModel):
    """Every served model."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Health(BaseModel):
    """State of the service."""

    status: str = Field(examples=["ready"])
    lost_devices: list[str] | None = Field(
        default=None,
        description="GPUs that failed and take no batches; left out where all work.",
        examples=[["cuda:1"]],
    )


def make_models_router(catalog: Catalog) -> APIRouter:
    """Make `/v1/models`."""
    router = APIRouter()

    @router.get("/v1/models", tags=["models"])
    async def list_models() -> ModelList:
        """List the served models."""
        return ModelList(data=[_entry(endpoint) for endpoint in catalog.endpoints])

    @router.get("/v1/models/{model}", tags=["models"], responses=_UNKNOWN)
    async def get_model(model: str) -> dict[str, Any]:
        """Give a model's manifest: how it is fed, what it gives, how good it is, where it comes from."""
        endpoint = catalog.get(model)
        spec = endpoint.spec.model_dump(mode="json")  # with the defaults that the file leaves out
        return endpoint.manifest.model_dump(mode="json") | {"spec": spec} | _entry(endpoint).model_dump()

    return router


def make_health_router(catalog: Catalog) -> APIRouter:
    """Make `/health`."""
    router = APIRouter()

    @router.get("/health/live", tags=["health"], response_model_exclude_none=True)
    async def live() -> Health:
        """Tell that the process answers."""
        return Health(status="live")

    @router.get("/health/ready", tags=["health"], responses=_NOT_READY, response_model_exclude_none=True)
    async def ready() -> Health:
        """Tell whether requests are taken: models work on some device, and the service is not stopping."""
        catalog.check_ready()
        return Health(status="ready", lost_devices=catalog.check_devices() or None)

    return router


def make_metrics_router(metrics: Metrics) -> APIRouter:
    """Make `/metrics`."""
    router = APIRouter()

    @router.get("/metrics", tags=["health"], response_class=Response)
    def scrape() -> Response:
        """Give the metrics in Prometheus' text format; on a thread, as asking a GPU may block."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _entry(endpoint: Endpoint) -> ModelEntry:
    manifest, runtime = endpoint.manifest, endpoint.runtime
    return ModelEntry(
        id=manifest.name,
        created=int(manifest.created.timestamp()),
        owned_by=manifest.owned_by,
        task=manifest.task,
        version=manifest.version,
        default=manifest.default,
        runtime=runtime.name,
        device=runtime.device,
        kernel=runtime.kernel,
        precision=manifest.precision,
    )
