"""Holds docs/operations.md to the settings and the metrics of the service."""

import ast

from service.settings import Settings
from tests.docs.repository import document, is_named
from tests.golden_files import REPOSITORY


def metric_names() -> set[str]:
    tree = ast.parse((REPOSITORY / "service" / "metrics.py").read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if text.startswith("inference_") and text.isidentifier()}


def test_every_setting_is_documented() -> None:
    text = document("docs/operations.md")
    names = [f"SERVICE_{field.upper()}" for field in Settings.model_fields]
    assert names
    assert [name for name in names if not is_named(name, text)] == []


def test_every_metric_is_documented() -> None:
    text = document("docs/operations.md")
    names = metric_names()
    assert names
    # prometheus-client itself appends these two to the name of a counter and of an info.
    documented = {name for name in names for end in ("", "_total", "_info") if is_named(name + end, text)}
    assert names - documented == set()
