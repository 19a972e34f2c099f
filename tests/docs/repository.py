"""What the documentation tests read: the repository's files, Markdown without its code, and the README's examples."""

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.golden_files import REPOSITORY

FENCED = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


_BLOCK = re.compile(r"^```\w*\n(.*?)^```\n(?:\n```json\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """A command of the README.

    Attributes:
        command: one line.
        answer: the JSON that stands below it, if there is some.
    """

    command: str
    answer: str | None


def readme_curls() -> list[Example]:
    """The README's curls, in order."""
    blocks = _BLOCK.findall(document("README.md"))
    return [
        Example(line, answer or None)
        for code, answer in blocks
        for line in code.splitlines()
        if line.startswith("curl ")
    ]


@cache
def repository_files() -> tuple[Path, ...]:
    """Every file that is tracked or would be; skips the test outside a git checkout."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("needs a git checkout to tell the repository's files from others")
    paths = (REPOSITORY / name.decode() for name in listing.stdout.split(b"\0") if name)
    return tuple(path for path in paths if path.is_file())  # one that is deleted but tracked is no file


def document(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return INLINE_CODE.sub("", FENCED.sub("", text))


def is_named(name: str, text: str) -> bool:
    """Whether the name stands in the text by itself, not as a part of a longer one."""
    return re.search(rf"(?<![\w/-]){re.escape(name)}(?![\w/-])", text) is not None
