import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import Serve
from tests.service.routes.test_problems import check_problem
from tests.service.tiny_bundle import NAME

pytestmark = pytest.mark.anyio

KEY = "0123456789abcdef0123456789abcdef"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
TASK = "/v1/image-classification"
RELOAD = "/v1/admin/reload"
GUARDED = [
    ("POST", TASK),
    ("POST", f"{TASK}/{NAME}"),
    ("GET", TASK),
    ("POST", f"{TASK}/"),
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{NAME}"),
    ("POST", RELOAD),
    ("GET", "/v1"),
    ("GET", "/"),
    ("GET", "/nowhere"),
    ("OPTIONS", TASK),
    ("POST", "/%761/image-classification"),
    ("POST", "//v1/image-classification"),
    ("GET", "/docs/../v1/models"),
    ("GET", "/health"),
    ("GET", "/metrics/"),
]
MakePicture = Callable[..., bytes]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    return path


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer 0123456789abcdef"}, {"X-API-Key": KEY}], ids=str)
async def test_without_a_key_nothing_is_told(
    serve: Serve, keys_file: Path, method: str, path: str, headers: dict[str, str]
) -> None:
    async with serve(api_keys_file=keys_file) as client:
        answer = await client.request(method, path, content=b"x", headers=headers)
    check_problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["cache-control"] == "no-store"


async def test_a_key_opens_every_way(serve: Serve, keys_file: Path, make_picture: MakePicture) -> None:
    async with serve(api_keys_file=keys_file) as client:
        client.headers = httpx.Headers(WITH_KEY)
        for path in (TASK, f"{TASK}/{NAME}"):
            assert (await client.post(path, content=make_picture((1, 1, 1)))).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post(RELOAD)).status_code == 200
        assert (await client.get("/nowhere")).status_code == 404


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/docs", "/docs/assets/swagger-ui.css"])
async def test_health_metrics_and_the_page_are_for_everybody(serve: Serve, keys_file: Path, path: str) -> None:
    async with serve(api_keys_file=keys_file) as client:
        assert (await client.get(path)).status_code == 200


async def test_without_a_file_of_keys_only_what_is_the_operator_s_is_closed(
    client: httpx.AsyncClient, make_picture: MakePicture
) -> None:
    assert (await client.post(TASK, content=make_picture((1, 1, 1)))).status_code == 200
    answer = await client.post(RELOAD, headers=WITH_KEY)
    assert "SERVICE_API_KEYS_FILE" in check_problem(answer, 401, "unauthorized")["detail"]


async def test_who_is_kept_out_is_logged_without_the_key(
    serve: Serve, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.access")
    async with serve(api_keys_file=keys_file) as client:
        headers = {"X-Request-Id": "abc", "Authorization": "Bearer wrong-secret"}
        await client.post(TASK, content=b"x", headers=headers)
    (line,) = [record.fields for record in caplog.records if record.name == "service.access"]
    assert line == {"request_id": "abc", "outcome": "unauthorized", "status": 401}
    assert "wrong-secret" not in caplog.text


async def test_the_description_asks_for_a_key_where_one_is_needed(
    settings: Callable[..., Settings], keys_file: Path
) -> None:
    def find_guarded(**fields: Any) -> set[str]:
        paths = create_app(settings(**fields)).openapi()["paths"]
        return {path for path, methods in paths.items() if any("security" in method for method in methods.values())}

    assert find_guarded() == {RELOAD}
    with_keys = find_guarded(api_keys_file=keys_file)
    assert {RELOAD, TASK, "/v1/models", "/v1/models/{model}"} < with_keys
    assert not {path for path in with_keys if not path.startswith("/v1/")}


async def test_who_is_kept_out_is_counted_under_no_model(serve: Serve, keys_file: Path) -> None:
    async with serve(api_keys_file=keys_file) as client:
        for path in (TASK, f"{TASK}/{NAME}", f"{TASK}/{'x' * 50}", "/v1/models"):
            await client.post(path, content=b"x")
        text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("inference_requests_total{")]
    assert lines == ['inference_requests_total{model="",outcome="unauthorized"} 4.0']


async def test_who_has_no_key_for_what_is_the_operator_s_is_counted_too(client: httpx.AsyncClient) -> None:
    await client.post(RELOAD)
    assert 'inference_requests_total{model="",outcome="unauthorized"} 1.0' in (await client.get("/metrics")).text
