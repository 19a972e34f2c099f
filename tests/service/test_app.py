import re
from typing import Any

import httpx
import pytest

from service import errors
from service.routes.problems import MEDIA_TYPE, Problem
from service.tasks import TASKS
from tests.service.tiny_bundle import NAME

pytestmark = pytest.mark.anyio


@pytest.fixture
async def openapi(client: httpx.AsyncClient) -> dict[str, Any]:
    document: dict[str, Any] = (await client.get("/openapi.json")).json()
    return document


def resolve(openapi: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    found: dict[str, Any] = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("end", ["", "/{model}"])
async def test_openapi_describes_each_task_by_its_own_types(openapi: dict[str, Any], name: str, end: str) -> None:
    task = TASKS[name]
    operation = openapi["paths"][f"/v1/{name}{end}"]["post"]
    parameters = {parameter["name"]: parameter for parameter in operation["parameters"]}
    assert set(task.Options.model_fields) <= set(parameters)
    for option, field in task.Options.model_fields.items():
        assert parameters[option]["in"] == "query"
        assert parameters[option]["description"] == field.description
        assert parameters[option]["schema"]["examples"] == field.examples
    assert "X-Request-Timeout-Seconds" in parameters
    assert ("model" in parameters) == bool(end)
    content = operation["requestBody"]["content"]
    assert set(content) == task.media_types | {"application/octet-stream", "multipart/form-data"}
    assert content["multipart/form-data"]["schema"]["required"] == ["file"]
    answer = resolve(openapi, operation["responses"]["200"]["content"]["application/json"]["schema"])
    assert answer["title"] == task.Result.__name__
    assert set(answer["properties"]) == set(task.Result.model_fields)
    for example in answer["examples"]:
        task.Result.model_validate(example)
    assert operation["summary"] == (task.__doc__ or "").strip()


async def test_openapi_names_every_path_once(openapi: dict[str, Any]) -> None:
    operations = [operation for path in openapi["paths"].values() for operation in path.values()]
    identifiers = [operation["operationId"] for operation in operations]
    assert len(identifiers) == len(set(identifiers))
    assert {"/v1/models", "/v1/models/{model}", "/health/live", "/health/ready"} <= set(openapi["paths"])


async def test_openapi_describes_every_error_as_a_problem(openapi: dict[str, Any]) -> None:
    for path in openapi["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if not status.startswith("2"):
                    schema = resolve(openapi, response["content"][MEDIA_TYPE]["schema"])
                    assert set(schema["properties"]) == set(Problem.model_fields), (operation["operationId"], status)


@pytest.mark.parametrize("name", TASKS)
async def test_openapi_names_every_status_that_a_task_answers_with(openapi: dict[str, Any], name: str) -> None:
    statuses = {str(error.status) for error in vars(errors).values() if hasattr(error, "status")}
    statuses -= {"403", "405"}  # of other methods than POST
    if not TASKS[name].drawing:
        statuses.remove("406")
    responses = openapi["paths"][f"/v1/{name}"]["post"]["responses"]
    assert responses.keys() == statuses | {"200"}
    assert "headers" in responses["408"]["description"]


async def test_the_docs_page_references_only_files_that_are_served_here(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    links = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page) + re.findall(r"""url:\s*["']([^"']+)["']""", page)
    assert len(links) >= 4
    assert "http" not in page.lower().replace("<!doctype html>", "")
    for link in links:
        assert re.match("/[^/]", link)
        answer = await client.get(link)
        assert answer.status_code == 200, link
        assert answer.content


async def test_there_is_no_other_page_that_needs_the_internet(client: httpx.AsyncClient) -> None:
    assert (await client.get("/redoc")).status_code == 404


async def test_the_catalog_hangs_on_the_application(client: httpx.AsyncClient) -> None:
    app = client._transport.app  # type: ignore[attr-defined]
    assert [endpoint.manifest.name for endpoint in app.state.catalog.endpoints] == [NAME]
