"""A real Prometheus, Debian's, that scrapes one target every half second."""

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import yaml

from tests.golden_files import REPOSITORY
from tests.service.server_process import HOST, eventually

CONFIG = REPOSITORY / "docker" / "prometheus" / "prometheus.yml"
INTERVAL = "500ms"


def find_tool(name: str) -> str:
    """The path of `prometheus` or `promtool`; skips the test where Debian's package is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}, which Debian's package prometheus brings")
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


class Prometheus:
    """Runs the repository's configuration, with other addresses and a shorter interval.

    Args:
        folder: for its data.
        target: host and port of what the job `service` scrapes.
    """

    def __init__(self, folder: Path, *, target: str) -> None:
        self.port = free_port()
        config = yaml.safe_load(CONFIG.read_text())
        config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), INTERVAL)
        config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
        addresses = {"service": target, "prometheus": f"{HOST}:{self.port}"}
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [addresses[job["job_name"]]]}]
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                find_tool("prometheus"),
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={HOST}:{self.port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Self:
        eventually(self._is_up)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _is_up(self) -> bool:
        assert self._process.poll() is None, Path(self._log.name).read_text()
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/-/ready"):
                return True
        except OSError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers; an error of a query is an error here."""
        url = f"http://{HOST}:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """The value of each series that a query gives at this moment."""
        return [float(sample["value"][1]) for sample in self.get("query", query=query)["result"]]
