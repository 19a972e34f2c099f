import shutil
from collections.abc import Callable

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import errors
from service.errors import ServiceError
from service.metrics import DROPS, RATIOS, SECONDS, STAGES, Metrics, ModelMetrics
from tests.service.conftest import Serve
from tests.service.tiny_bundle import NAME

# Name → type, labels: the table that dashboards and alerts rely on.
TABLE = {
    "inference_requests": ("counter", {"model", "outcome"}),
    "inference_request_duration_seconds": ("histogram", {"model"}),
    "inference_stage_duration_seconds": ("histogram", {"model", "stage"}),
    "inference_batch_size": ("histogram", {"model"}),
    "inference_batch_padding_ratio": ("histogram", {"model"}),
    "inference_queue_depth": ("gauge", {"model"}),
    "inference_queue_limit": ("gauge", {"model"}),
    "inference_batches_in_flight": ("gauge", {"model"}),
    "inference_workers": ("gauge", {"model"}),
    "inference_drops": ("counter", {"model", "reason"}),
    "inference_model_device_up": ("gauge", {"model", "device"}),
    "inference_ranks_ready": ("gauge", {"model"}),
    "inference_rank_sent_bytes": ("counter", {"model"}),
    "inference_rank_waiting_seconds": ("counter", {"model"}),
    "inference_rank_imbalance_ratio": ("histogram", {"model"}),
    "inference_bundle_info": ("gauge", {"model", "version", "runtime", "kernel", "sha256"}),
}
OUTCOMES = {"ok", "cancelled"} | {
    value.code
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, ServiceError) and value is not ServiceError
}
PATH = "/v1/image-classification"


async def scrape_after_requests(serve: Serve, make_picture: Callable[..., bytes]) -> str:
    """What `/metrics` says after requests that went well and requests that did not."""
    async with serve() as client:
        for body, query, media_type in [
            (make_picture((1, 2, 3)), "", "image/png"),
            (make_picture((1, 2, 3)), "?top_k=2", "image/png"),
            (b"", "", ""),
            (b"text", "", "text/plain"),
            (b"text", "?top_k=99", "image/png"),
            (b"x" * 300_000, "", "image/png"),
        ]:
            await client.post(PATH + query, content=body, headers={"Content-Type": media_type})
        await client.post(f"{PATH}/unknown", content=b"")
        await client.get("/nowhere/" + "x" * 300)
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return answer.text


def is_ours(name: str) -> bool:
    """Those of the process and of Python are prometheus-client's."""
    return not name.startswith(("process_", "python_"))


def test_the_registry_holds_the_table_and_what_every_process_tells() -> None:
    found = {family.name: family.type for family in Metrics().registry.collect()}
    assert {name: kind for name, kind in found.items() if is_ours(name)} == {n: kind for n, (kind, _) in TABLE.items()}
    assert found.keys() >= {"process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds"}
    assert found.keys() >= {"python_info", "python_gc_collections"}


def test_two_applications_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    ModelMetrics(first, "m").count("ok")
    name, labels = "inference_requests_total", {"model": "m", "outcome": "ok"}
    assert first.registry.get_sample_value(name, labels) == 1
    assert second.registry.get_sample_value(name, labels) is None


def test_buckets_reach_from_a_millisecond_to_thirty_seconds() -> None:
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 30.0)
    assert list(SECONDS) == sorted(SECONDS)
    assert list(RATIOS) == sorted(RATIOS)


@pytest.mark.anyio
async def test_names_and_labels_of_the_answer_are_closed_sets(serve: Serve, make_picture: Callable[..., bytes]) -> None:
    text = await scrape_after_requests(serve, make_picture)
    found = {family.name: family for family in text_string_to_metric_families(text) if is_ours(family.name)}
    assert set(found) - {f"{name}_created" for name in TABLE} == set(TABLE)
    for name, (kind, labels) in TABLE.items():
        assert found[name].type == kind
        for sample in found[name].samples:
            assert set(sample.labels) - {"le"} == labels
            assert sample.labels["model"] in ({NAME, ""} if name == "inference_requests" else {NAME})
            assert sample.labels.get("stage", "run") in STAGES
            assert sample.labels.get("outcome", "ok") in OUTCOMES
            assert sample.labels.get("reason", "expired") in DROPS


@pytest.mark.anyio
async def test_requests_are_counted_by_outcome(serve: Serve, make_picture: Callable[..., bytes]) -> None:
    text = await scrape_after_requests(serve, make_picture)
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    requests = [sample for sample in samples if sample.name == "inference_requests_total"]
    counts = {sample.labels["outcome"]: sample.value for sample in requests if sample.labels["model"] == NAME}
    assert counts == {"ok": 2, "invalid_input": 2, "unsupported_media_type": 1, "body_too_large": 1}
    counts = {sample.labels["outcome"]: sample.value for sample in requests if sample.labels["model"] == ""}
    assert counts == {"unknown_model": 1, "unknown_path": 1}
    (depth,) = [sample.value for sample in samples if sample.name == "inference_queue_depth"]
    assert depth == 0
    stages = {s.labels["stage"]: s.value for s in samples if s.name == "inference_stage_duration_seconds_count"}
    assert stages == dict.fromkeys(STAGES, 2)


@pytest.mark.anyio
async def test_promtool_finds_no_fault(serve: Serve, make_picture: Callable[..., bytes]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, which Debian's package prometheus brings")
    text = await scrape_after_requests(serve, make_picture)
    check = await anyio.run_process([promtool, "check", "metrics"], input=text.encode(), check=False)
    assert (check.returncode, check.stdout + check.stderr) == (0, b"")
