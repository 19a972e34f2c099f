"""Holds the README's section "Map" to the folders that exist."""

import re

from tests.docs.repository import INLINE_CODE, document, repository_files
from tests.golden_files import REPOSITORY


def map_paths() -> set[str]:
    """Paths in the README's section "Map": what stands there as code and looks like a path."""
    found = re.search(r"^## Map\n(.*?)(?=^## |\Z)", document("README.md"), re.MULTILINE | re.DOTALL)
    assert found, 'README.md has no section "## Map"'
    names = {code for _, code in INLINE_CODE.findall(found[1])}
    return {name for name in names if re.fullmatch(r"[\w./-]*[./][\w./-]*", name)}


def test_every_path_of_the_map_exists() -> None:
    assert {path for path in map_paths() if not (REPOSITORY / path).exists()} == set()


def test_the_map_names_every_folder() -> None:
    tops = {path.relative_to(REPOSITORY).parts[0] for path in repository_files() if path.parent != REPOSITORY}
    assert {f"{top}/" for top in tops if not top.startswith(".")} - map_paths() == set()
