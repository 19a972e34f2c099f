"""Holds docs/models.md to the bundles in bundles/."""

from pathlib import Path

import pytest

from tests.docs.repository import document, is_named
from tests.golden_files import REPOSITORY

BUNDLES = sorted(path.parent for path in (REPOSITORY / "bundles").glob("*/manifest.json"))


def test_there_is_a_bundle() -> None:
    assert BUNDLES != []


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
@pytest.mark.parametrize("page", ["docs/models.md", "bundles/LICENSES.md"])
def test_every_bundle_is_documented(bundle: Path, page: str) -> None:
    assert is_named(bundle.name, document(page))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_every_bundle_has_a_model_card(bundle: Path) -> None:
    assert bundle.name in (bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
