from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from service.bundle import open_bundle
from service.settings import Settings
from tests.service.conftest import Serve
from tests.service.tiny_bundle import NAME

pytestmark = pytest.mark.anyio


async def test_models_are_listed_as_openai_clients_read_them(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body == {
        "object": "list",
        "data": [
            {
                "id": NAME,
                "object": "model",
                "created": int(datetime(2026, 1, 2, tzinfo=UTC).timestamp()),
                "owned_by": "tests",
                "task": "image-classification",
                "version": "1.2.3",
                "default": True,
                "runtime": "onnx",
                "device": "cpu",
                "kernel": "portable",
                "precision": "fp32",
            }
        ],
    }


async def test_a_model_tells_its_whole_manifest(client: httpx.AsyncClient, tiny_bundle: Path) -> None:
    body = (await client.get(f"/v1/models/{NAME}")).json()
    manifest = open_bundle(tiny_bundle).manifest.model_dump(mode="json")
    entry = (await client.get("/v1/models")).json()["data"][0]
    written, spec = manifest.pop("spec"), body.pop("spec")
    assert written.items() <= spec.items()
    assert spec.keys() - written.keys() == {"explanation"}  # a default, which the file leaves out
    assert body == manifest | entry | {"created": entry["created"]}


async def test_health_tells_live_and_ready(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health/live")).json() == {"status": "live"}
    assert (await client.get("/health/ready")).json() == {"status": "ready"}


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert f'inference_queue_depth{{model="{NAME}"}} 0.0' in answer.text.splitlines()


async def test_the_list_names_what_really_runs(serve: Serve, settings: Callable[..., Settings]) -> None:
    async with serve(device="auto") as client:
        (entry,) = (await client.get("/v1/models")).json()["data"]
    assert entry["device"] == "cpu" or entry["device"].startswith("cuda:")
