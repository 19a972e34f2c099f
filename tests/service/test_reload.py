import asyncio
import json
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import reload as reload_module
from service.bundle import MANIFEST, Bundle
from service.catalog import Catalog
from service.endpoint import Endpoint
from service.errors import BundleError
from service.metrics import Metrics, ModelDeviceMetrics, RankMetrics
from service.runtimes.onnx import OnnxRuntime
from service.settings import Settings
from tests.service.conftest import Serve
from tests.service.tiny_bundle import GOLDEN, NAME, PROGRAM, reseal

pytestmark = pytest.mark.anyio

TASK = "/v1/image-classification"
KEY = "0123456789abcdef0123456789abcdef"
PATIENCE_SECONDS = 30.0
MakePicture = Callable[..., bytes]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    return path


@pytest.fixture
def serve_copy(serve: Serve, bundle_copy: Path, keys_file: Path) -> Callable[..., Any]:
    """Serves the copy of the bundle, for those who have the key."""

    @asynccontextmanager
    async def run(**fields: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with serve(bundles=bundle_copy.parent, api_keys_file=keys_file, **fields) as client:
            client.headers = httpx.Headers({"Authorization": f"Bearer {KEY}"})
            yield client

    return run


@pytest.fixture
async def client(serve_copy: Callable[..., Any]) -> AsyncIterator[httpx.AsyncClient]:
    async with serve_copy() as one:
        yield one


def write(path: Path, text: str) -> None:
    path.write_text(text)


def add(bundle: Path, name: str, **facts: Any) -> Path:
    """A further bundle beside another one; it is no default unless said so."""
    folder = shutil.copytree(bundle, bundle.parent / name)
    reseal(folder, **{"name": name, "default": False} | facts)
    return folder


async def reload(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.post("/v1/admin/reload")
    assert answer.status_code == 200, answer.text
    return answer.json()


def changes(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if value and name not in {"unchanged", "refused"}}


def catalog_of(client: httpx.AsyncClient) -> Catalog:
    return client._transport.app.state.catalog  # type: ignore[attr-defined]


async def info(client: httpx.AsyncClient) -> set[tuple[str, str]]:
    """Model and version of each sample of the metric that says what is served."""
    lines = (await client.get("/metrics")).text.splitlines()
    samples = [line for line in lines if line.startswith("inference_bundle_info{")]
    parts = [
        dict(pair.split("=") for pair in line[line.index("{") + 1 : line.index("}")].split(",")) for line in samples
    ]
    return {(json.loads(part["model"]), json.loads(part["version"])) for part in parts}


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - whoever makes it true knows nothing of this test
            await asyncio.sleep(0.005)


# What changes


async def test_nothing_changed_is_what_is_told(client: httpx.AsyncClient) -> None:
    before = catalog_of(client).get(NAME)
    assert await reload(client) == {"added": [], "replaced": [], "removed": [], "unchanged": [NAME], "refused": []}
    assert catalog_of(client).get(NAME) is before


async def test_bundles_are_added_replaced_and_removed(
    client: httpx.AsyncClient, bundle_copy: Path, make_picture: MakePicture
) -> None:
    picture = make_picture((9, 1, 1))
    second = add(bundle_copy, "second")
    assert changes(await reload(client)) == {"added": ["second"]}
    assert (await client.post(f"{TASK}/second", content=picture)).json()["model"] == "second"
    reseal(bundle_copy, version="1.3.0")
    assert changes(await reload(client)) == {"replaced": [NAME]}
    assert (await client.post(TASK, content=picture)).json()["version"] == "1.3.0"
    assert await info(client) == {(NAME, "1.3.0"), ("second", "1.2.3")}
    shutil.rmtree(second)
    assert changes(await reload(client)) == {"removed": ["second"]}
    assert (await client.post(f"{TASK}/second", content=picture)).status_code == 404
    assert {entry["id"] for entry in (await client.get("/v1/models")).json()["data"]} == {NAME}


async def test_the_metrics_of_a_removed_model_disappear_and_those_of_a_replaced_one_go_on(
    client: httpx.AsyncClient, bundle_copy: Path, make_picture: MakePicture
) -> None:
    second = add(bundle_copy, "second")
    await reload(client)
    for path in (f"{TASK}/second", f"{TASK}/{NAME}"):
        await client.post(path, content=make_picture((1, 1, 1)))
    assert 'model="second"' in (await client.get("/metrics")).text
    shutil.rmtree(second)
    reseal(bundle_copy, version="2.0.0")
    await reload(client)
    await catalog_of(client).wait_for_retired()
    await client.post(f"{TASK}/{NAME}", content=make_picture((1, 1, 1)))
    text = (await client.get("/metrics")).text
    assert 'model="second"' not in text
    assert f'inference_requests_total{{model="{NAME}",outcome="ok"}} 2.0' in text.splitlines()
    assert f'inference_queue_depth{{model="{NAME}"}} 0.0' in text.splitlines()


async def test_what_is_replaced_is_closed(
    client: httpx.AsyncClient, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[OnnxRuntime] = []
    close = OnnxRuntime.close
    monkeypatch.setattr(OnnxRuntime, "close", lambda self: (closed.append(self), close(self)))
    old = catalog_of(client).get(NAME).runtime
    reseal(bundle_copy, version="2.0.0")
    await reload(client)
    await catalog_of(client).wait_for_retired()
    assert closed == [old]


async def test_a_renamed_folder_is_the_same_model_opened_again(client: httpx.AsyncClient, bundle_copy: Path) -> None:
    shutil.move(bundle_copy, bundle_copy.with_name("renamed"))
    assert changes(await reload(client)) == {"replaced": [NAME]}


# The default of a task


async def test_the_default_moves_with_the_manifests(
    client: httpx.AsyncClient, bundle_copy: Path, make_picture: MakePicture
) -> None:
    add(bundle_copy, "second", default=True)
    reseal(bundle_copy, default=False)
    assert changes(await reload(client)) == {"added": ["second"], "replaced": [NAME]}
    assert (await client.post(TASK, content=make_picture((1, 1, 1)))).json()["model"] == "second"
    reseal(bundle_copy.parent / "second", default=False)
    await reload(client)
    assert (await client.post(TASK, content=make_picture((1, 1, 1)))).status_code == 404


async def test_a_second_default_is_refused(client: httpx.AsyncClient, bundle_copy: Path) -> None:
    second = add(bundle_copy, "second", default=True)
    report = await reload(client)
    assert changes(report) == {}
    (refusal,) = report["refused"]
    assert refusal["folder"] == str(second)
    assert f"{NAME} and second both say that they are the default" in refusal["reason"]
    assert 'model="second"' not in (await client.get("/metrics")).text


async def test_a_default_whose_successor_is_refused_stays(
    client: httpx.AsyncClient, bundle_copy: Path, make_picture: MakePicture
) -> None:
    second = add(bundle_copy, "second", default=True)
    (second / PROGRAM).write_bytes(b"broken")
    reseal(bundle_copy, default=False)
    report = await reload(client)
    assert changes(report) == {"replaced": [NAME]}
    assert (await client.post(TASK, content=make_picture((1, 1, 1)))).json()["model"] == NAME


# What is refused


def break_checksum(folder: Path) -> None:
    reseal(folder, version="2.0.0")
    (folder / PROGRAM).write_bytes(b"broken")


def break_program(folder: Path) -> None:
    (folder / PROGRAM).write_bytes(b"broken")
    reseal(folder, version="2.0.0")


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def break_golden(folder: Path) -> None:
    (folder / GOLDEN).write_bytes(b"broken")
    reseal(folder, version="2.0.0")


def break_task(folder: Path) -> None:
    reseal(folder, task="image-poetry")


@pytest.mark.parametrize("damage", [break_checksum, break_program, break_manifest, break_golden, break_task])
async def test_a_broken_bundle_is_refused_and_the_old_one_goes_on(
    client: httpx.AsyncClient,
    bundle_copy: Path,
    make_picture: MakePicture,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    before = catalog_of(client).get(NAME)
    damage(bundle_copy)
    report = await reload(client)
    assert (changes(report), report["unchanged"]) == ({}, [NAME])
    (refusal,) = report["refused"]
    assert refusal["folder"] == str(bundle_copy)
    assert str(bundle_copy) in refusal["reason"]
    assert "is refused" in caplog.text
    assert catalog_of(client).get(NAME) is before
    assert (await client.post(TASK, content=make_picture((1, 1, 1)))).json()["version"] == "1.2.3"
    assert await info(client) == {(NAME, "1.2.3")}


async def test_a_broken_bundle_does_not_hold_others_up(client: httpx.AsyncClient, bundle_copy: Path) -> None:
    add(bundle_copy, "second")
    break_manifest(bundle_copy)
    report = await reload(client)
    assert (changes(report), report["unchanged"], len(report["refused"])) == ({"added": ["second"]}, [NAME], 1)


async def test_a_fault_that_nobody_thought_of_refuses_that_bundle(
    client: httpx.AsyncClient, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Endpoint:
        raise MemoryError("of the inside")

    reseal(bundle_copy, version="2.0.0")
    monkeypatch.setattr(reload_module, "open_endpoint", fail)
    (refusal,) = (await reload(client))["refused"]
    assert "not known why" in refusal["reason"]
    assert "of the inside" in caplog.text
    assert catalog_of(client).get(NAME).manifest.version == "1.2.3"


async def test_a_new_bundle_that_is_refused_at_last_leaves_no_metrics(
    client: httpx.AsyncClient, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_endpoint = reload_module.open_endpoint

    def open_on_gpus_without_ranks(bundle: Bundle, settings: Settings, metrics: Metrics, pool: Any) -> Endpoint:
        endpoint = open_endpoint(bundle, settings, metrics, pool)
        ModelDeviceMetrics(metrics, bundle.manifest.name).set_up("cuda:0")
        RankMetrics(metrics, bundle.manifest.name)
        endpoint.close()
        raise BundleError("the ranks do not start")

    add(bundle_copy, "second")
    reseal(bundle_copy, version="2.0.0")
    monkeypatch.setattr(reload_module, "open_endpoint", open_on_gpus_without_ranks)
    assert len((await reload(client))["refused"]) == 2
    text = (await client.get("/metrics")).text
    assert 'model="second"' not in text
    assert f'inference_queue_depth{{model="{NAME}"}} 0.0' in text.splitlines()  # its old version goes on


@pytest.mark.parametrize("has_folder", [True, False])
async def test_a_folder_without_bundles_takes_nothing_away(
    client: httpx.AsyncClient, bundle_copy: Path, has_folder: bool
) -> None:
    shutil.rmtree(bundle_copy if has_folder else bundle_copy.parent)
    report = await reload(client)
    assert (changes(report), report["unchanged"], len(report["refused"])) == ({}, [NAME], 1)


async def test_two_bundles_that_swap_names_are_both_replaced(client: httpx.AsyncClient, bundle_copy: Path) -> None:
    second = add(bundle_copy, "second")
    await reload(client)
    reseal(second, name=NAME, default=True)
    reseal(bundle_copy, name="second", default=False)
    assert changes(await reload(client)) == {"replaced": ["second", NAME]}
    assert catalog_of(client).get(NAME).bundle.folder == second


async def test_one_who_wants_a_taken_name_is_refused_and_stays_what_it_was(
    client: httpx.AsyncClient, bundle_copy: Path
) -> None:
    second = add(bundle_copy, "second")
    await reload(client)
    reseal(second, name=NAME)
    report = await reload(client)
    assert (changes(report), report["unchanged"]) == ({}, ["second", NAME])
    assert f"two bundles are named {NAME}" in report["refused"][0]["reason"]


# Keys


async def test_keys_are_read_again(client: httpx.AsyncClient, keys_file: Path) -> None:
    write(keys_file, "fedcba9876543210fedcba9876543210\n")
    assert (await reload(client))["refused"] == []
    assert (await client.get("/v1/models")).status_code == 401
    client.headers = httpx.Headers({"Authorization": "Bearer fedcba9876543210fedcba9876543210"})
    write(keys_file, "short\n")
    (refusal,) = (await reload(client))["refused"]
    assert refusal["folder"] == str(keys_file)
    assert (await client.get("/v1/models")).status_code == 200


# Under load


async def test_no_request_fails_while_versions_are_swapped(
    serve_copy: Callable[..., Any], bundle_copy: Path, make_picture: MakePicture
) -> None:
    picture = make_picture((9, 1, 1), size=(64, 64))
    answers: list[httpx.Response] = []
    is_over = False

    async def ask(client: httpx.AsyncClient) -> None:
        while not is_over:
            answers.append(await client.post(TASK, content=picture))

    versions = [f"2.0.{number}" for number in range(8)]
    async with serve_copy(workers=2) as client:
        clients = [asyncio.ensure_future(ask(client)) for _ in range(8)]
        for version in versions:
            reseal(bundle_copy, version=version)
            assert changes(await reload(client)) == {"replaced": [NAME]}
            num_answers = len(answers)
            await until(lambda: len(answers) >= num_answers + 20)  # noqa: B023 - awaited in this very round
        is_over = True
        await asyncio.gather(*clients)
        await catalog_of(client).wait_for_retired()
        assert f'inference_queue_depth{{model="{NAME}"}} 0.0' in (await client.get("/metrics")).text.splitlines()
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["version"] for answer in answers} == {"1.2.3", *versions}


async def test_a_request_whose_body_is_on_the_way_is_answered_by_the_version_it_found(
    client: httpx.AsyncClient, bundle_copy: Path, make_picture: MakePicture
) -> None:
    picture = make_picture((1, 1, 1))
    is_sent = asyncio.Event()

    async def send() -> AsyncIterator[bytes]:
        yield picture[:20]
        await is_sent.wait()
        yield picture[20:]

    old = catalog_of(client).get(NAME)
    waiting = asyncio.ensure_future(client.post(TASK, content=send()))
    await until(lambda: old._num_holders)
    reseal(bundle_copy, version="2.0.0")
    assert changes(await reload(client)) == {"replaced": [NAME]}
    assert (await client.post(TASK, content=picture)).json()["version"] == "2.0.0"
    assert not waiting.done()
    is_sent.set()
    answer = await waiting
    assert (answer.status_code, answer.json()["version"]) == (200, "1.2.3")
    await catalog_of(client).wait_for_retired()


async def test_a_second_reload_waits_for_the_first(
    client: httpx.AsyncClient, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    opened: list[str] = []
    open_bundle = reload_module.open_bundle

    def open_slowly(folder: Path) -> Any:
        bundle = open_bundle(folder)
        opened.append(bundle.manifest.version)
        assert gate.wait(PATIENCE_SECONDS)
        return bundle

    monkeypatch.setattr(reload_module, "open_bundle", open_slowly)
    reseal(bundle_copy, version="2.0.0")
    first = asyncio.ensure_future(reload(client))
    await until(lambda: opened)
    second = asyncio.ensure_future(reload(client))
    assert (await client.get("/health/ready")).status_code == 200, "the event loop is free meanwhile"
    assert not second.done()
    gate.set()
    assert changes(await first) == {"replaced": [NAME]}
    assert changes(await second) == {}
    assert opened == ["2.0.0"]


async def test_a_service_that_stops_takes_nothing_over(
    client: httpx.AsyncClient, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[OnnxRuntime] = []

    def close(self: OnnxRuntime) -> None:
        closed.append(self)

    monkeypatch.setattr(OnnxRuntime, "close", close)
    await catalog_of(client).drain()
    reseal(bundle_copy, version="2.0.0")
    answer = await client.post("/v1/admin/reload")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert len(closed) == 1, "what was opened is closed"
    assert catalog_of(client).get(NAME).manifest.version == "1.2.3"


# Watching


async def test_a_change_is_taken_over_where_the_folder_is_watched(
    serve_copy: Callable[..., Any], bundle_copy: Path, make_picture: MakePicture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.reload")
    async with serve_copy(watch_seconds=0.01) as client:
        reseal(bundle_copy, version="2.0.0")
        await until(lambda: catalog_of(client).get(NAME).manifest.version == "2.0.0")
        break_manifest(bundle_copy)
        await until(lambda: "is refused" in caplog.text)
        num_refusals = caplog.text.count("is refused")
        await asyncio.sleep(0.1)
        assert caplog.text.count("is refused") == num_refusals, "what did not change is not tried again"
        write(bundle_copy / MANIFEST, "{}")
        await until(lambda: caplog.text.count("is refused") == num_refusals + 1)
        assert (await client.post(TASK, content=make_picture((1, 1, 1)))).json()["version"] == "2.0.0"


async def test_a_copy_that_is_under_way_is_left_alone(
    serve_copy: Callable[..., Any], bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as each look finds another state than the last one did, nothing is opened."""
    states = iter(range(10**9))
    looks: list[int] = []
    is_copying = True

    def read_state(_: reload_module.Reloader) -> frozenset[Any]:
        looks.append(1)
        return frozenset({next(states) if is_copying else -1})

    monkeypatch.setattr(reload_module.Reloader, "_read_state", read_state)
    reseal(bundle_copy, version="1.9.0")
    async with serve_copy(watch_seconds=0.001) as client:
        add(bundle_copy, "second")
        await until(lambda: len(looks) > 10)
        assert {endpoint.manifest.name for endpoint in catalog_of(client).endpoints} == {NAME}
        is_copying = False
        await until(lambda: len(catalog_of(client).endpoints) == 2)


async def test_a_reload_that_fails_does_not_end_the_watch(
    serve_copy: Callable[..., Any], bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = reload_module.Reloader.reload

    async def fail(_: reload_module.Reloader) -> Any:
        raise RuntimeError("of the inside")

    monkeypatch.setattr(reload_module.Reloader, "reload", fail)
    async with serve_copy(watch_seconds=0.005) as client:
        await until(lambda: "reload failed" in caplog.text)
        monkeypatch.setattr(reload_module.Reloader, "reload", good)
        reseal(bundle_copy, version="2.0.0")
        await until(lambda: catalog_of(client).get(NAME).manifest.version == "2.0.0")
