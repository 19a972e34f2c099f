"""Holds every Markdown file to its links within the repository."""

import re
from pathlib import Path

from tests.docs.repository import FENCED, repository_files, without_code
from tests.golden_files import REPOSITORY

LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")


def links(text: str) -> list[str]:
    return [inline or reference for inline, reference in LINK.findall(without_code(text))]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings: lower case, hyphens for spaces, a number from the second on."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCED.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{number}" if number else slug)
    return found


def fault(page: Path, link: str) -> str | None:
    """What is wrong with a link that stands in a page; None where nothing is."""
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.is_relative_to(REPOSITORY):
        return "leaves the repository"
    if not target.exists():
        return "names no file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
        return "names no heading"
    return None


def test_every_link_within_the_repository_resolves() -> None:
    pages = [path for path in repository_files() if path.suffix == ".md"]
    found = [(page, link) for page in pages for link in links(page.read_text(encoding="utf-8"))]
    faults = [(page, link, fault(page, link)) for page, link in found if not SCHEME.match(link)]
    assert faults
    assert [f"{page.relative_to(REPOSITORY)}: {link} {what}" for page, link, what in faults if what] == []


def test_a_link_to_nothing_is_a_fault() -> None:
    page = REPOSITORY / "CONTRIBUTING.md"
    assert fault(page, "absent.md") == "names no file"
    assert fault(page, "../absent.md") == "leaves the repository"
    assert fault(page, "#no-such-heading") == "names no heading"


def test_links_in_code_are_not_links() -> None:
    assert links("`[a](b)` and [c](d)\n```\n[e](f)\n```\n[g]: h\n") == ["d", "h"]


def test_anchors_are_those_of_github() -> None:
    assert anchors("# Two words\n## `code`, *and* more\n## Two words\n") == {
        "two-words",
        "code-and-more",
        "two-words-1",
    }
