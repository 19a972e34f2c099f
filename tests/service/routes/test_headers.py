import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from service.catalog import Catalog
from tests.service.conftest import Serve
from tests.service.routes.test_problems import check_problem
from tests.service.tiny_bundle import NAME

pytestmark = pytest.mark.anyio

PATH = "/v1/image-classification"
ORIGIN = "https://example.org"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
MakePicture = Callable[..., bytes]


def check_headers(answer: httpx.Response) -> None:
    names = [name for name, _ in answer.headers.multi_items()]
    assert len(names) == len(set(names)), names
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", PATH, 400),
        ("GET", PATH, 405),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models", 200),
        ("GET", f"/v1/models/{NAME}", 200),
        ("GET", "/health/ready", 200),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
    ],
)
async def test_every_answer_carries_them_once(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    check_headers(answer)


async def test_a_prediction_and_a_fault_carry_them_too(
    client: httpx.AsyncClient, make_picture: MakePicture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = await client.post(PATH, content=make_picture((1, 1, 1)))
    assert answer.status_code == 200
    check_headers(answer)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Catalog, "get", fail)
    answer = await client.get(f"/v1/models/{NAME}")
    assert answer.status_code == 500
    check_headers(answer)


async def test_the_page_may_run_its_own_scripts_and_no_others(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    inline = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in inline}
    assert hashes
    assert set(policy["script-src"].split()) == hashes | {"'self'"}
    assert (policy["default-src"], policy["frame-ancestors"]) == ("'none'", "'none'")
    assert len(re.findall(r"<script", answer.text)) == len(inline) + len(re.findall(r"<script src=\"/", answer.text))
    asset = await client.get("/docs/assets/swagger-ui.css")
    assert asset.headers["x-content-type-options"] == "nosniff"
    assert asset.headers["cache-control"] == "no-cache"


# Pages of other origins


@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
async def test_pages_of_other_origins_get_nothing_by_default(client: httpx.AsyncClient, method: str) -> None:
    answer = await client.request(method, PATH, headers=PREFLIGHT)
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_pages_of_an_origin_that_is_named_may_call(serve: Serve, make_picture: MakePicture) -> None:
    async with serve(cors_origins="https://other.example, https://example.org") as client:
        preflight = await client.options(
            PATH, headers=PREFLIGHT | {"Access-Control-Request-Headers": "authorization,content-type,x-request-id"}
        )
        answer = await client.post(PATH, content=make_picture((1, 1, 1)), headers={"Origin": ORIGIN})
        stranger = await client.post(PATH, content=make_picture((1, 1, 1)), headers={"Origin": "https://evil.example"})
    assert preflight.status_code == 200
    assert answer.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == answer.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-credentials" not in answer.headers
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in stranger.headers


REFUSED = [
    ({"Origin": "https://evil.example"}, "a page of https://evil.example asks to send POST"),
    ({"Access-Control-Request-Method": "DELETE"}, "asks to send DELETE"),
    ({"Access-Control-Request-Headers": "x-secret, content-type"}, "with x-secret, content-type; "),
    ({"Access-Control-Request-Headers": "x" * 500}, f"with {'x' * 200}; "),
]


@pytest.mark.parametrize(("change", "detail"), REFUSED)
async def test_a_preflight_that_is_refused_is_answered_and_counted_like_every_error(
    serve: Serve, change: dict[str, str], detail: str
) -> None:
    async with serve(cors_origins=ORIGIN) as client:
        answer = await client.options(PATH, headers=PREFLIGHT | change)
        metrics = (await client.get("/metrics")).text
    problem = check_problem(answer, 403, "cross_origin_refused")
    assert detail in problem["detail"]
    check_headers(answer)
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (None if "Origin" in change else ORIGIN)
    assert 'inference_requests_total{model="",outcome="cross_origin_refused"} 1.0' in metrics


async def test_a_preflight_that_is_granted_carries_them_and_is_not_counted(serve: Serve) -> None:
    async with serve(cors_origins="*") as client:
        answer = await client.options(PATH, headers=PREFLIGHT)
        metrics = (await client.get("/metrics")).text
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    check_headers(answer)
    assert "inference_requests_total{" not in metrics


@pytest.mark.parametrize("part", ["bytes=0-9", "bytes=99999999-", "lines=1", "nonsense"])
async def test_the_page_s_files_are_given_whole(client: httpx.AsyncClient, part: str) -> None:
    path = "/docs/assets/swagger-ui.css"
    whole = await client.get(path)
    answer = await client.get(path, headers={"Range": part})
    assert (answer.status_code, answer.content) == (200, whole.content)
