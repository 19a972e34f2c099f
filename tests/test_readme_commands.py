"""The README's curls as they stand there, against one service with the shipped bundles."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from service.bundle import MANIFEST
from service.tasks import TASKS
from tests.docs.repository import Example, readme_curls
from tests.golden_files import REPOSITORY
from tests.service.server_process import HOST, ServerProcess

README_ADDRESS = "127.0.0.1:8000"
MIN_COLOURS = 16  # of a picture that shows something


class Answer(NamedTuple):
    """What curl received."""

    status: int
    media_type: str
    body: bytes


def task_of(example: Example) -> str | None:
    """The task that a curl sends an input to; None where it asks for something else."""
    path = example.command.partition(f"{README_ADDRESS}/v1/")[2]
    return next((task for task in TASKS if path.startswith(task)), None)


def name_of(example: Example) -> str:
    given = re.search(r"samples/(\w+)", example.command)
    asked = example.command.rpartition("/v1/")[2].strip('"')
    return f"{given[1] if given else 'no sample'} to {asked}"


EXAMPLES = [example for example in readme_curls() if task_of(example)]
PICTURES = [example for example in EXAMPLES if "Accept: image/png" in example.command]
JSONS = [example for example in EXAMPLES if example not in PICTURES]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Serves what ships; batches of one input need no measuring of larger ones at the start."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPOSITORY / "bundles", folder / "bundles")
    for path in (folder / "bundles").glob(f"*/{MANIFEST}"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_batch": 1}))
    settings = {"bundles": folder / "bundles", "cache": folder / "cache", "workers": 1, "decode_threads": 1}
    with ServerProcess([sys.executable, "-m", "service"], folder=folder, **settings) as process:
        yield process


def run(example: Example, server: ServerProcess, folder: Path) -> Answer:
    """Run a curl in a folder that has the samples, as the repository's root does, with another port."""
    (folder / "samples").symlink_to(REPOSITORY / "samples")
    words = shlex.split(example.command.replace(README_ADDRESS, f"{HOST}:{server.port}"))
    done = subprocess.run(
        [*words, "--silent", "--show-error", "--write-out", "%{stderr}%{http_code} %{content_type}"],
        cwd=folder,
        capture_output=True,
        timeout=60,
        check=False,
    )
    told = done.stderr.decode()
    assert done.returncode == 0, told
    body = (folder / words[words.index("-o") + 1]).read_bytes() if "-o" in words else done.stdout
    status, media_type = told.split(" ", 1)
    return Answer(int(status), media_type.partition(";")[0], body)


def test_every_task_has_an_example_and_those_that_draw_show_a_picture() -> None:
    assert {task_of(example) for example in JSONS} | {task_of(example) for example in PICTURES} == TASKS.keys()
    drawn = {"image-classification", "image-segmentation", "brain-network-classification"}
    assert {task_of(example) for example in PICTURES} == drawn


@pytest.mark.parametrize("example", PICTURES, ids=name_of)
def test_a_curl_that_asks_for_a_picture_gets_one(example: Example, server: ServerProcess, tmp_path: Path) -> None:
    answer = run(example, server, tmp_path)
    assert (answer.status, answer.media_type) == (200, "image/png"), answer.body
    picture = Image.open(io.BytesIO(answer.body))
    picture.load()
    assert picture.format == "PNG"
    colours = picture.convert("RGB").getcolors(maxcolors=picture.width * picture.height)
    assert colours is not None
    assert len(colours) >= MIN_COLOURS


@pytest.mark.parametrize("example", JSONS, ids=name_of)
def test_a_curl_gets_the_answer_that_the_readme_shows(example: Example, server: ServerProcess, tmp_path: Path) -> None:
    answer = run(example, server, tmp_path)
    found = json.loads(answer.body)
    if example.answer is not None:
        shown = json.loads(example.answer)
        assert found.keys() == shown.keys()
        words = {name for name, value in shown.items() if isinstance(value, str)} - {"request_id"}
        assert {name: found[name] for name in words} == {name: shown[name] for name in words}
    if "status" in found:  # an error, which must be one that the README announces
        assert example.answer is not None, found
        assert (answer.status, answer.media_type) == (found["status"], "application/problem+json")
    else:
        assert (answer.status, answer.media_type) == (200, "application/json")
        task = task_of(example)
        assert task is not None
        TASKS[task].Result.model_validate_json(answer.body)
