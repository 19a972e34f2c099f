"""A fresh clone: `make serve` in an environment of its own, then the README's first curl."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.repository import readme_curls, repository_files
from tests.golden_files import REPOSITORY
from tests.service.server_process import HOST, ServerProcess

INSTALL_SECONDS = 1200.0  # some 300 MB of packages


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A copy of the files that the repository has, without what tools and environments left beside them."""
    if shutil.which("curl") is None or shutil.which("make") is None:
        pytest.skip("needs curl and make")
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "--retries=1", "--timeout=15", "download", "--quiet", "--no-deps"]
    asked = subprocess.run([*pip, f"--dest={packages}", "idna"], capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip(f"needs a package index that can be reached: {asked.stderr.strip().splitlines()[-1:]}")
    root = tmp_path / "clone"
    for path in repository_files():
        target = root / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    yield root
    shutil.rmtree(root)  # its environment is large


def classify(root: Path, port: int) -> dict[str, Any]:
    """Run the README's command, with another port."""
    command = readme_curls()[0].command.replace("127.0.0.1:8000", f"{HOST}:{port}")
    assert str(port) in command
    done = subprocess.run(
        [*shlex.split(command), "--silent", "--show-error", "--fail-with-body"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def stop(server: ServerProcess) -> None:
    server.send_signal(signal.SIGTERM)  # make passes it on
    server.wait()
    assert "Application shutdown complete" in server.log()
    assert "Traceback" not in server.log()


def test_a_fresh_clone_serves_after_one_command_and_gives_the_same_answer_after_a_second_start(clone: Path) -> None:
    command = ["make", "serve", f"PYTHON={sys.executable}"]
    with ServerProcess(command, folder=clone.parent, root=clone, patience_seconds=INSTALL_SECONDS) as server:
        answer = classify(clone, server.port)
        assert answer["predictions"][0]["label"]
        assert 0 < answer["predictions"][0]["score"] <= 1
        stop(server)
    find_torch = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    assert subprocess.run([clone / ".venv/bin/python", "-c", find_torch], check=False).returncode == 0
    start = time.monotonic()
    with ServerProcess(command, folder=clone.parent, root=clone) as server:
        assert classify(clone, server.port) == answer
        print(f"the second start reached its first answer after {time.monotonic() - start:.2f} s")
        stop(server)
