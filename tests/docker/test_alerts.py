"""The alert rules: promtool's own checks, their unit tests, and that each says what to do."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.docker.panels import METRIC
from tests.docker.prometheus_server import CONFIG, find_tool
from tests.docker.test_dashboard import OF_PROMETHEUS, declared_metrics
from tests.docs.repository import document
from tests.docs.test_links import anchors

RULES = CONFIG.parent / "alerts.yml"
TESTS = Path(__file__).parent / "alerts_test.yml"


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([find_tool("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_prometheus_reads_its_configuration() -> None:
    assert "1 rule files found" in promtool("check", "config", CONFIG)


def test_the_rules_have_no_fault() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_the_rules_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", TESTS)


def test_every_rule_is_tested_to_fire_and_to_be_silent() -> None:
    checks = [check for test in yaml.safe_load(TESTS.read_text())["tests"] for check in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == names
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == names


def test_a_threshold_that_moves_fails_the_unit_tests(tmp_path: Path) -> None:
    text = RULES.read_text()
    moves = [("> 0.05", "> 0.5"), ("> 2.5", "> 25"), (">= 5", ">= 1"), (">= 20", ">= 1"), ("> 0.8", "> 0.95")]
    for before, after in [*moves, ("offset 15m", "offset 1m"), (" or absent", " and absent")]:
        assert text.count(before) == 1, before
        (tmp_path / "alerts.yml").write_text(text.replace(before, after))
        (tmp_path / "test.yml").write_text(
            TESTS.read_text().replace("../../docker/prometheus/alerts.yml", "alerts.yml")
        )
        done = subprocess.run([find_tool("promtool"), "test", "rules", tmp_path / "test.yml"], check=False)
        assert done.returncode != 0, f"nothing holds {before}"


def test_every_metric_of_a_rule_is_one_of_the_service() -> None:
    names = {name for rule in rules() for name in METRIC.findall(rule["expr"])}
    assert names - declared_metrics() - OF_PROMETHEUS == set()
    assert len(names) >= 7


def test_every_rule_names_the_words_that_say_what_to_do() -> None:
    headings = anchors(document("docs/operations.md"))
    for rule in rules():
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (page, anchor) == ("docs/operations.md", rule["alert"].lower())
        assert anchor in headings
