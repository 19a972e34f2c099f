"""The committed dashboard, as the tests read it."""

import json
import re
from typing import Any, NamedTuple

from tests.golden_files import REPOSITORY

DASHBOARD = REPOSITORY / "docker" / "grafana" / "dashboards" / "service.json"
METRIC = re.compile(r"\b(?:inference|process|python)_\w+|\bup\b|\bALERTS\b")


class Query(NamedTuple):
    """One query of one panel."""

    panel: str
    expression: str


def read_dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return board


def panels() -> list[dict[str, Any]]:
    """All but the rows, which are headings."""
    return [panel for panel in read_dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    return [Query(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def fill_in(expression: str, *, interval: str) -> str:
    """A query as Grafana sends it while all models are chosen."""
    return expression.replace("$__rate_interval", interval).replace("$model", ".*")
