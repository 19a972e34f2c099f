"""Every panel of the dashboard, on a real Prometheus that scraped the real service under load."""

import math
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docker.panels import fill_in, panels, queries, read_dashboard
from tests.docker.prometheus_server import Prometheus, find_tool
from tests.service.server_process import HOST, ServerProcess, eventually, predict_head
from tests.service.tiny_bundle import NAME, write_tiny_bundle

# Panels without data where the service finds no GPU.
NEED_A_GPU = {"GPU memory", "GPU utilisation", "GPU answers"}
INTERVAL = "1m"  # longer than the test runs: a rate then needs two scrapes and no more
OK = f'inference_requests_total{{model="{NAME}", outcome="ok"}}'


class Loaded(NamedTuple):
    """The service under load, and who watches it."""

    prometheus: Prometheus
    server: ServerProcess


def load(server: ServerProcess, picture: bytes) -> None:
    """Requests of every kind: answered, refused, expired, abandoned."""
    for _ in range(5):
        assert server.post("/v1/image-classification", picture).status == 200
    assert server.post("/v1/image-classification", b"no picture").status == 400
    late = server.post("/v1/image-classification", picture, X_Request_Timeout_Seconds="0.000001")
    assert late.status == 504


def leave(server: ServerProcess, picture: bytes) -> None:
    """A client that sends all and waits for nothing."""
    head = predict_head(f"Content-Length: {len(picture)}")
    with socket.create_connection((HOST, server.port)) as sock:
        sock.sendall(head + picture)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, samples: Path) -> Iterator[Loaded]:
    find_tool("prometheus")
    folder = tmp_path_factory.mktemp("loaded")
    write_tiny_bundle(folder / "bundles" / NAME)
    picture = (samples / "photo_cat_cc0.jpg").read_bytes()
    settings = {"bundles": folder / "bundles", "cache": folder / "cache", "workers": 2, "decode_threads": 1}
    with (
        ServerProcess([sys.executable, "-m", "service"], folder=folder, **settings) as server,
        Prometheus(folder, target=f"{HOST}:{server.port}") as prometheus,
    ):
        # A series that begins above 0 has no rate: each has to be seen once before it grows.
        for _ in range(2):
            load(server, picture)
            leave(server, picture)
            seen = server.metric("inference_requests_total", outcome="ok")
            eventually(lambda seen=seen: prometheus.values(OK) == [seen])
        eventually(lambda: sum(prometheus.values(f"rate({OK}[{INTERVAL}])")) > 0)
        yield Loaded(prometheus, server)


def test_every_panel_has_data(loaded: Loaded) -> None:
    has_gpu = bool(loaded.prometheus.values("inference_device_up"))
    empty = set()
    for panel, expression in queries():
        values = loaded.prometheus.values(fill_in(expression, interval=INTERVAL))
        if not values or all(math.isnan(value) for value in values):
            empty.add((panel, expression))
    assert {one for one in empty if has_gpu or one[0] not in NEED_A_GPU} == set()


def test_the_panels_that_may_lack_data_exist() -> None:
    assert {panel["title"] for panel in panels()} >= NEED_A_GPU


def test_a_query_for_a_metric_that_is_not_there_has_no_data(loaded: Loaded) -> None:
    assert loaded.prometheus.values("inference_no_such_metric") == []


def test_the_choice_of_models_has_the_model(loaded: Loaded) -> None:
    (choice,) = read_dashboard()["templating"]["list"]
    assert choice["query"] == "label_values(inference_queue_limit, model)"
    found = loaded.prometheus.get("label/model/values", **{"match[]": "inference_queue_limit"})
    assert found == [NAME]


def test_no_alert_fires_while_all_is_well(loaded: Loaded) -> None:
    groups = loaded.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"]: rule["state"] for rule in rules if rule["state"] != "inactive"} == {}
    assert {rule["health"] for rule in rules} == {"ok"}
    assert len(rules) == 5
