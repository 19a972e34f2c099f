"""Holds the Dockerfile and the compose files to their promises, as far as that goes without a container engine."""

import json
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

DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
BIN = Path(sys.executable).parent
LOOPBACK_PORTS = {
    "service": ["127.0.0.1:8000:8000"],
    "prometheus": ["127.0.0.1:9090:9090"],
    "grafana": ["127.0.0.1:3000:3000"],
}


class ComposeLoader(yaml.SafeLoader):
    """Reads compose's own tag `!reset`: what it stands before is taken away."""


ComposeLoader.add_constructor("!reset", lambda *_: None)


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), ComposeLoader)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read(REPOSITORY / "compose.yaml")["services"]
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def seconds(duration: str) -> float:
    value, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return float(value) * {"s": 1, "m": 60}[unit]


def test_hadolint_finds_no_fault() -> None:
    run(BIN / "hadolint", DOCKERFILE)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_the_compose_files_keep_to_the_schema(name: str, tmp_path: Path) -> None:
    plain = tmp_path / "compose.json"  # the tool knows no tags
    plain.write_text(json.dumps(read(REPOSITORY / name)))
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", plain)


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.cpu.yaml"]])
def test_docker_reads_the_compose_files(files: list[str]) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs docker with its compose plugin")
    run(docker, "compose", *(word for name in files for word in ("-f", name)), "config", "--quiet")


def test_shell_scripts_are_well_formed() -> None:
    scripts = [REPOSITORY / "docker" / "install.sh", REPOSITORY / "docker" / "smoke.sh"]
    for script in scripts:
        run("bash", "-n", script)


def test_base_images_are_written_out() -> None:
    stages: set[str] = set()
    for base, stage in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE):
        assert base in stages or base == "python:3.11-slim-bookworm"
        stages.add(stage)
    assert {"cpu", "gpu"} <= stages


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_images_that_run_install_nothing(target: str) -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)[1:]
    texts = {stage.split()[2]: stage for stage in stages}
    text = texts[target] + texts["service"]
    assert "pip" not in text
    assert re.search(r"^USER \d+$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text


def test_the_build_sees_what_it_copies_and_no_more() -> None:
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    seen = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {path.rstrip("/") for path in re.findall(r"^COPY ([^-]\S*) ", DOCKERFILE.read_text(), re.MULTILINE)}
    assert copied == seen
    assert all((REPOSITORY / path).exists() for path in seen)


def test_ports_are_open_to_this_host_alone(services: dict[str, Any]) -> None:
    assert {name: service["ports"] for name, service in services.items()} == LOOPBACK_PORTS


def test_every_service_is_bounded_and_comes_back(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["restart"] == "unless-stopped"
        assert service["mem_limit"]
        assert service["pids_limit"]
        assert service["cap_drop"] == ["ALL"]
        assert service["logging"]["options"]["max-size"]


def test_only_settings_that_exist_are_passed_and_none_needs_a_value(services: dict[str, Any]) -> None:
    known = {f"SERVICE_{name}".upper() for name in Settings.model_fields}
    environment = services["service"]["environment"]
    assert environment.keys() <= known
    assert environment == {name: f"${{{name}:-}}" for name in environment}
    for text in re.findall(r"\$\{[^}]*\}", (REPOSITORY / "compose.yaml").read_text()):
        assert re.fullmatch(r"\$\{\w+:[-+][^}]*\}", text), f"{text} needs a value"


def test_the_grace_is_longer_than_the_drain(services: dict[str, Any]) -> None:
    assert seconds(services["service"]["stop_grace_period"]) > Settings().drain_seconds
    assert "SERVICE_DRAIN_SECONDS" not in services["service"]["environment"], "the grace could not follow it"


def test_a_host_without_a_gpu_reserves_none_and_builds_the_small_image(services: dict[str, Any]) -> None:
    assert "devices" in services["service"]["deploy"]["resources"]["reservations"]
    over = read(REPOSITORY / "compose.cpu.yaml")["services"]["service"]
    assert (over["deploy"], over["build"]["target"]) == (None, "cpu")


def test_every_file_that_is_mounted_exists(services: dict[str, Any]) -> None:
    volumes = [volume for service in services.values() for volume in service["volumes"]]
    paths = [volume.split(":")[0] for volume in volumes if volume.startswith("./")]
    assert len(paths) >= 5
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_grafana_has_an_administrator_only_where_a_password_is_given(services: dict[str, Any]) -> None:
    text = (REPOSITORY / "docker" / "grafana" / "grafana.ini").read_text()
    for line in ("disable_initial_admin_creation = true", "disable_login_form = true", "org_role = Viewer"):
        assert line in text.splitlines()
    assert services["grafana"]["environment"] == {
        "GF_SECURITY_ADMIN_PASSWORD": "${GRAFANA_ADMIN_PASSWORD:-}",
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "${GRAFANA_ADMIN_PASSWORD:+false}",
        "GF_AUTH_DISABLE_LOGIN_FORM": "${GRAFANA_ADMIN_PASSWORD:+false}",
    }


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, Any]) -> None:
    provisioning = REPOSITORY / "docker" / "grafana" / "provisioning"
    (source,) = read(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = read(provisioning / "dashboards" / "service.yaml")["providers"]
    mounts = [volume.split(":")[:2] for volume in services["grafana"]["volumes"]]
    assert ["./docker/grafana/dashboards", provider["options"]["path"]] in mounts


def test_prometheus_scrapes_the_service_where_it_listens() -> None:
    jobs = read(REPOSITORY / "docker" / "prometheus" / "prometheus.yml")["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    assert targets["service"] == [f"service:{Settings().port}"]
