"""Holds the committed dashboard to the code that makes it, to Grafana's types, and to the metrics there are."""

import importlib.util
import inspect
import json
import typing
from enum import Enum
from types import ModuleType
from typing import Any, cast

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard, DataTransformerConfig, Panel
from prometheus_client import CollectorRegistry
from pydantic import ConfigDict, TypeAdapter, ValidationError

from service.devices import Devices
from service.metrics import Metrics
from tests.docker.panels import DASHBOARD, METRIC, panels, queries, read_dashboard
from tests.golden_files import REPOSITORY
from tests.service.fake_nvml import FakeNvml

OF_PROMETHEUS = {"up", "ALERTS"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", REPOSITORY / "docker" / "grafana" / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decode(board: dict[str, Any]) -> Dashboard:
    register_default_plugins()
    decoded = Dashboard.from_json(board)
    for panel in decoded.panels or []:
        if isinstance(panel, Panel) and panel.transformations:  # the decoder leaves these as they came
            panel.transformations = [
                DataTransformerConfig.from_json(cast(dict[str, Any], one)) for one in panel.transformations
            ]
    return decoded


def unknown_fields(board: dict[str, Any]) -> list[str]:
    """The paths of what is lost when Grafana's types read the dashboard and write it again."""
    return lost(board, json.loads(json.dumps(decode(board), cls=JSONEncoder)))


def lost(before: object, after: object, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [fault for key in before for fault in lost(before[key], after.get(key), f"{path}/{key}".strip("/"))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [fault for place, pair in pairs for fault in lost(*pair, f"{path}/{place}")]
    return [] if before == after else [path]


def check_types(value: object) -> None:
    """Hold every attribute of Grafana's objects to its annotation: their decoder takes whatever comes.

    Raises: ValidationError.
    """
    if isinstance(value, list | tuple):
        for one in value:
            check_types(one)
    elif isinstance(value, dict):
        check_types(list(value.values()))
    elif type(value).__module__.startswith("grafana_foundation_sdk.models") and hasattr(value, "to_json"):
        hints = typing.get_type_hints(type(value))
        assert hints.keys() >= vars(value).keys(), inspect.getfile(type(value))
        for name, content in vars(value).items():
            adapter: TypeAdapter[Any] = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
            adapter.validate_python(content, strict=not has_enum(hints[name]))
            check_types(content)


def has_enum(hint: Any) -> bool:
    """Whether a value of it may be that of an enumeration, which Grafana's decoder leaves as it came."""
    return any(isinstance(one, type) and issubclass(one, Enum) for one in (hint, *typing.get_args(hint)))


def declared_metrics() -> set[str]:
    """The names of all samples that the service can expose, on a machine with a GPU."""
    metrics = Metrics()
    metrics.watch(Devices(FakeNvml(), [0]))
    return sample_names(metrics.registry)


def sample_names(registry: CollectorRegistry) -> set[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes.get(family.type, ("",))}


def test_the_committed_dashboard_is_what_the_code_makes(script: ModuleType) -> None:
    assert DASHBOARD.read_text() == script.render(), "run make dashboard"


def test_grafana_knows_every_field() -> None:
    assert unknown_fields(read_dashboard()) == []


def test_a_field_that_grafana_does_not_know_is_found() -> None:
    board = read_dashboard()
    board["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    assert unknown_fields(board) == ["panels/1/fieldConfig/defaults/units"]


def test_every_field_has_the_type_that_grafana_wants() -> None:
    check_types(decode(read_dashboard()))


@pytest.mark.parametrize(
    ("path", "value"), [("title", 3), ("targets", [{"expr": 1}]), ("datasource", {"uid": 1}), ("gridPos", {"h": "8"})]
)
def test_a_field_of_another_type_is_found(path: str, value: object) -> None:
    board = read_dashboard()
    board["panels"][1][path] = value
    with pytest.raises((ValidationError, TypeError, AttributeError, KeyError)):
        check_types(decode(board))


def test_every_metric_of_a_panel_is_one_of_the_service() -> None:
    names = {name for query in queries() for name in METRIC.findall(query.expression)}
    assert names - declared_metrics() - OF_PROMETHEUS == set()
    assert {name for name in names if name.startswith("inference_device")}, "a machine without GPU checks these, too"


def test_panels_and_their_queries_have_names_of_their_own() -> None:
    board = read_dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert sorted(set(ids)) == ids
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    for panel in panels():
        names = [target["refId"] for target in panel["targets"]]
        assert sorted(set(names)) == names


def test_what_an_operator_asks_first_has_a_panel() -> None:
    titles = {panel["title"] for panel in panels()}
    assert titles >= {"Requests", "Errors by code", "Request", "Queue depth", "Batch size", "Padding", "What is served"}
    assert titles >= {"Batches in flight", "Drops", "Queue saturation", "GPU memory", "GPU utilisation"}
    assert titles >= {f"Stage {stage}" for stage in ("decode", "queue", "run", "postprocess")}
