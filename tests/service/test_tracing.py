import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service import tracing
from service.endpoint import Endpoint
from service.errors import SettingError
from service.metrics import STAGES
from service.tracing import NAME as SERVICE
from service.tracing import Tracing
from tests.golden_files import REPOSITORY
from tests.service.conftest import Serve
from tests.service.tiny_bundle import NAME

PATH = "/v1/image-classification"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"Traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
MakePicture = Callable[..., bytes]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What the application sends its spans to instead of a collector."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "open_tracing", lambda _: Tracing(SimpleSpanProcessor(exporter)))
    return exporter


@pytest.fixture
async def client(serve: Serve, exporter: InMemorySpanExporter) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(otlp_endpoint="http://collector:4318") as one:
        yield one


def root_of(spans: tuple[ReadableSpan, ...]) -> ReadableSpan:
    (root,) = [span for span in spans if span.kind is SpanKind.SERVER]
    return root


@pytest.mark.anyio
async def test_a_request_has_a_span_for_each_stage(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, make_picture: MakePicture
) -> None:
    before = time.time_ns()
    answer = await client.post(PATH, content=make_picture((1, 1, 1)), headers={"X-Request-Id": "abc"})
    after = time.time_ns()
    assert answer.status_code == 200
    spans = exporter.get_finished_spans()
    root = root_of(spans)
    stages = {span.name: span for span in spans if span.parent is not None}
    assert set(stages) == set(STAGES)
    assert root.name == f"POST {PATH}"
    assert dict(root.attributes) == {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "inference.model": NAME,
        "inference.outcome": "ok",
        "inference.request_id": "abc",
    }
    for span in stages.values():
        assert span.parent.span_id == root.context.span_id
        assert span.context.trace_id == root.context.trace_id
        # The clocks of stages and of spans are read one after the other.
        assert root.start_time - 5_000_000 <= span.start_time <= span.end_time <= root.end_time + 5_000_000
    assert before <= root.start_time <= root.end_time <= after
    assert stages["decode"].end_time <= stages["run"].start_time <= stages["postprocess"].start_time
    times = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    for name, span in stages.items():
        assert (span.end_time - span.start_time) / 1e6 == pytest.approx(float(times[name]), abs=0.02)


@pytest.mark.anyio
async def test_requests_of_one_batch_and_the_batch_are_linked(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, make_picture: MakePicture
) -> None:
    await asyncio.gather(*(client.post(PATH, content=make_picture((1, 1, 1))) for _ in range(12)))
    spans = exporter.get_finished_spans()
    roots = {span.context.span_id for span in spans if span.kind is SpanKind.SERVER}
    batches = {span.context.span_id: span for span in spans if span.name == "batch"}
    runs = [span for span in spans if span.name == "run"]
    assert len(roots) == len(runs) == sum(span.attributes["inference.batch_size"] for span in batches.values()) == 12
    for batch in batches.values():
        assert batch.parent is None
        assert len(batch.links) == batch.attributes["inference.batch_size"]
    for run in runs:
        (link,) = run.links
        batch = batches[link.context.span_id]
        assert run.parent.span_id in {other.context.span_id for other in batch.links}
        assert (run.start_time, run.end_time) == pytest.approx((batch.start_time, batch.end_time), abs=5_000_000)
    assert {link.context.span_id for batch in batches.values() for link in batch.links} == roots


@pytest.mark.anyio
async def test_a_trace_goes_on_from_the_client_s(
    client: httpx.AsyncClient,
    exporter: InMemorySpanExporter,
    make_picture: MakePicture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="service.access")
    await client.post(PATH, content=make_picture((1, 1, 1)), headers=TRACEPARENT)
    await client.post(PATH, content=make_picture((1, 1, 1)), headers={"Traceparent": "00-nonsense-x-01"})
    first, second = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert second.parent is None
    lines = [record.fields for record in caplog.records if record.name == "service.access"]
    assert [line["trace_id"] for line in lines] == [TRACE_ID, f"{second.context.trace_id:032x}"]


@pytest.mark.anyio
async def test_a_request_that_is_refused_and_one_that_fails_have_spans(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.post(f"{PATH}/gpt", content=b"x")
    root = root_of(exporter.get_finished_spans())
    assert root.attributes["inference.outcome"] == "unknown_model"
    assert root.status.status_code is StatusCode.UNSET
    exporter.clear()

    async def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("of the inside")

    monkeypatch.setattr(Endpoint, "predict", fail)
    await client.post(PATH, content=b"x")
    root = root_of(exporter.get_finished_spans())
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "internal_error")
    assert "of the inside" not in str(root.to_json())


@pytest.mark.anyio
async def test_without_traces_the_client_s_trace_stands_in_the_log(
    serve: Serve, make_picture: MakePicture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.access")
    async with serve() as client:
        await client.post(PATH, content=make_picture((1, 1, 1)), headers=TRACEPARENT)
        await client.post(PATH, content=make_picture((1, 1, 1)))
    lines = [record.fields for record in caplog.records if record.name == "service.access"]
    assert [line.get("trace_id") for line in lines] == [TRACE_ID, None]


def test_without_traces_nothing_that_makes_or_sends_them_is_imported(tiny_bundle: Path, cache: Path) -> None:
    text = (
        "import sys; from service.app import create_app; from service.settings import Settings; "
        "create_app(Settings()); print(*sys.modules)"
    )
    environment = os.environ | {"SERVICE_BUNDLES": str(tiny_bundle.parent), "SERVICE_CACHE": str(cache)}
    ended = subprocess.run(
        [sys.executable, "-c", text], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    names = ended.stdout.split()
    assert "service.app" in names
    assert not {"service.tracing", "opentelemetry.sdk", "opentelemetry.exporter", "requests"} & set(names)


@pytest.mark.anyio
async def test_a_service_that_shall_trace_and_cannot_refuses_to_start(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "service.tracing", None)
    with pytest.raises(SettingError, match=r"SERVICE_OTLP_ENDPOINT is set.*requirements/tracing\.txt"):
        async with serve(otlp_endpoint="http://collector:4318"):
            pass


# Sent for real


class Collector(ThreadingHTTPServer):
    """Takes what is sent over OTLP."""

    def __init__(self) -> None:
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), _Receiver)


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Collector)
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.anyio
async def test_spans_are_sent_to_the_collector_at_the_latest_at_stop(
    serve: Serve, collector: Collector, make_picture: MakePicture
) -> None:
    async with serve(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/") as client:
        await client.post(PATH, content=make_picture((1, 1, 1)))
    ((path, sent),) = collector.received
    assert path == "/v1/traces"
    (resource,) = sent.resource_spans
    assert [item.value.string_value for item in resource.resource.attributes if item.key == "service.name"] == [SERVICE]
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {*STAGES, "batch", f"POST {PATH}"}


@pytest.mark.anyio
async def test_a_collector_that_is_not_there_harms_no_request(serve: Serve, make_picture: MakePicture) -> None:
    async with serve(otlp_endpoint="http://127.0.0.1:9") as client:  # the discard port: nobody listens
        assert (await client.post(PATH, content=make_picture((1, 1, 1)))).status_code == 200
        start = time.monotonic()
    assert time.monotonic() - start < 4 * tracing.SEND_SECONDS
