from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, count_cores, find_unknown_variables


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SERVICE_{name.upper()}", raising=False)


def test_nothing_needs_to_be_set() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.bundles) == ("127.0.0.1", 8000, Path("bundles"))
    assert settings.max_wait_seconds == 0


@pytest.mark.parametrize("field", Settings.model_fields)
def test_every_field_can_be_set_by_its_name_in_the_environment(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    given = {
        "host": "0.0.0.0",
        "bundles": "/b",
        "cache": "/c",
        "device": "cuda",
        "runtime": "torchscript",
        "log_level": "debug",
        "cors_origins": "https://a.example,http://localhost:3000",
        "otlp_endpoint": "http://collector:4318",
    }
    monkeypatch.setenv(f"SERVICE_{field.upper()}", given.get(field, "7"))
    value = getattr(Settings(), field)
    assert (",".join(value) if isinstance(value, tuple) else str(value)) in {given.get(field, "7"), "7.0"}


@pytest.mark.parametrize("field", Settings.model_fields)
def test_an_empty_variable_sets_nothing(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setenv(f"SERVICE_{field.upper()}", "")
    assert Settings() == Settings.model_construct()


@pytest.mark.parametrize("field", Settings.model_fields)
def test_every_field_is_described_in_one_line(field: str) -> None:
    description = Settings.model_fields[field].description
    assert description
    assert "\n" not in description


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "65536"),
        ("port", "http"),
        ("device", "tpu"),
        ("device", "cuda:x"),
        ("device", "cuda:01"),
        ("device", "cuda:0,cpu"),
        ("device", "cuda,cuda:1"),
        ("device", "cuda:0,cuda:0"),
        ("device", "cuda:0,"),
        ("workers", "-1"),
        ("max_queue", "0"),
        ("max_wait_seconds", "-1"),
        ("request_timeout_seconds", "0"),
        ("request_timeout_seconds", "inf"),
        ("body_timeout_seconds", "nan"),
        ("drain_seconds", "inf"),
        ("log_level", "loud"),
        ("metrics_port", "65536"),
        ("watch_seconds", "-1"),
        ("cors_origins", "example.org"),
        ("cors_origins", "https://example.org/"),
        ("cors_origins", "https://a.example,null"),
        ("otlp_endpoint", "collector:4318"),
        ("otlp_endpoint", "ftp://collector"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, field: str, value: str) -> None:
    monkeypatch.setenv(f"SERVICE_{field.upper()}", value)
    with pytest.raises(ValidationError, match=field):
        Settings()


@pytest.mark.parametrize(
    ("given", "taken"),
    [("auto", "auto"), (" cuda ", "cuda"), ("cuda:1", "cuda:1"), ("cuda:0, cuda:10", "cuda:0,cuda:10")],
)
def test_devices_have_one_spelling(monkeypatch: pytest.MonkeyPatch, given: str, taken: str) -> None:
    monkeypatch.setenv("SERVICE_DEVICE", given)
    assert Settings().device == taken


def test_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_CORS_ORIGINS", " https://a.example , http://[::1]:3000,*,")
    assert Settings().cors_origins == ("https://a.example", "http://[::1]:3000", "*")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match="prot"):
        Settings(prot=1)  # type: ignore[call-arg]


def test_there_is_a_core_to_count() -> None:
    assert count_cores() >= 1


def test_a_variable_that_sets_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_PORT", "7")
    monkeypatch.setenv("SERVICE_PROT", "7")
    assert find_unknown_variables() == ["SERVICE_PROT"]
