"""Holds the Kubernetes manifests and the systemd unit to their schemas and to the service's settings."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.golden_files import REPOSITORY

MANIFESTS = sorted((REPOSITORY / "docker" / "kubernetes").glob("*.yaml"))
UNIT = REPOSITORY / "docker" / "clustered-attention.service"
SETTINGS = {f"SERVICE_{name}".upper() for name in Settings.model_fields}


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    found = [yaml.safe_load(path.read_text()) for path in MANIFESTS]
    return {manifest["kind"]: manifest for manifest in found}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod["containers"]
    found: dict[str, Any] = one
    return found


def validate(*paths: Path) -> int:
    command = [Path(sys.executable).parent / "kubernetes-validate", "--strict", "--quiet", *paths]
    return subprocess.run(command, check=False).returncode


def test_manifests_keep_to_the_schema_of_kubernetes() -> None:
    assert len(MANIFESTS) == 3
    assert validate(*MANIFESTS) == 0


def test_a_field_that_kubernetes_does_not_know_is_found(tmp_path: Path, manifests: dict[str, Any]) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(manifests["Service"]))
    wrong["spec"]["port"] = 80
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    assert validate(tmp_path / "wrong.yaml") != 0


def test_one_label_joins_all(manifests: dict[str, Any]) -> None:
    spec = manifests["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_the_pod_stops_after_the_drain(pod: dict[str, Any], container: dict[str, Any]) -> None:
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait + Settings().drain_seconds


def test_probes_ask_what_they_mean(container: dict[str, Any]) -> None:
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {
        "startupProbe": "/health/ready",
        "readinessProbe": "/health/ready",
        "livenessProbe": "/health/live",  # a service that drains is not to be killed for it
    }
    assert container["ports"] == [{"name": "http", "containerPort": Settings().port}]


def test_the_pod_has_a_gpu_and_little_else(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    user = re.search(r"^USER (\d+)$", (REPOSITORY / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert pod["securityContext"]["runAsUser"] == int(user[1])
    assert {variable["name"] for variable in container["env"]} <= SETTINGS


def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / UNIT.name
    installed = "/opt/clustered-attention"
    text = UNIT.read_text().replace(f"{installed}/.venv/bin/python", sys.executable)  # it has to exist
    unit.write_text(text)
    done = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(text.replace("KillSignal", "KilSignal"))
    done = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert "KilSignal" in done.stderr


def test_the_unit_stops_after_the_drain() -> None:
    found = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert found is not None
    assert float(found[1]) > Settings().drain_seconds
    assert set(re.findall(r"SERVICE_[A-Z_]+(?==[^a])", UNIT.read_text())) <= SETTINGS | {"SERVICE_DRAIN_SECONDS"}
