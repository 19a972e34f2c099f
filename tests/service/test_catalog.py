import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from service.catalog import Catalog, open_catalog
from service.errors import BundleError, NotReady, UnknownModel
from service.metrics import Metrics
from service.settings import Settings
from tests.service.tiny_bundle import NAME, reseal

MakeSettings = Callable[..., Settings]
TASK = "image-classification"


def open_in(root: Path, settings: MakeSettings) -> Catalog:
    return open_catalog(settings(bundles=root), Metrics())


@pytest.fixture
def pair(bundle_copy: Path) -> Path:
    """A second bundle beside the first; it is no default."""
    second = shutil.copytree(bundle_copy, bundle_copy.parent / "second")
    reseal(second, name="second", default=False)
    return second


def test_the_default_answers_where_no_model_is_named(pair: Path, settings: MakeSettings) -> None:
    catalog = open_in(pair.parent, settings)
    assert catalog.find(TASK, None).manifest.name == NAME
    assert catalog.find(TASK, "second").manifest.name == "second"
    assert [endpoint.manifest.name for endpoint in catalog.endpoints] == ["second", NAME]
    assert catalog.get("second") is catalog.find(TASK, "second")


def test_the_metrics_tell_what_is_served(tiny_bundle: Path, settings: MakeSettings) -> None:
    metrics = Metrics()
    catalog = open_catalog(settings(), metrics)
    labels = {
        "model": NAME,
        "version": "1.2.3",
        "runtime": "onnx",
        "kernel": "portable",
        "sha256": catalog.get(NAME).bundle.sha256,
    }
    assert metrics.registry.get_sample_value("inference_bundle_info", labels) == 1


def test_the_name_is_the_manifest_s_not_the_folder_s(pair: Path, settings: MakeSettings) -> None:
    pair.rename(pair.with_name("renamed"))
    assert open_in(pair.parent, settings).get("second").manifest.name == "second"


@pytest.mark.parametrize("model", ["third", "", "../second"])
def test_an_unknown_model_is_answered_with_the_names_there_are(pair: Path, settings: MakeSettings, model: str) -> None:
    catalog = open_in(pair.parent, settings)
    for find in (lambda: catalog.find(TASK, model), lambda: catalog.get(model)):
        with pytest.raises(UnknownModel, match=f"this service has second, {NAME}"):
            find()


def test_a_model_of_another_task_is_unknown_to_this_one(pair: Path, settings: MakeSettings) -> None:
    with pytest.raises(UnknownModel, match="this service has none"):
        open_in(pair.parent, settings).find("speech-recognition", "second")


def test_without_a_default_a_model_must_be_named(bundle_copy: Path, settings: MakeSettings) -> None:
    reseal(bundle_copy, default=False)
    catalog = open_in(bundle_copy.parent, settings)
    with pytest.raises(UnknownModel, match=f"no model named, and no default.*this service has {NAME}"):
        catalog.find(TASK, None)


def test_two_defaults_of_one_task_refuse_to_start(pair: Path, settings: MakeSettings) -> None:
    reseal(pair, default=True)
    with pytest.raises(BundleError, match=f"second and {NAME} both say that they are the default for {TASK}"):
        open_in(pair.parent, settings)


def test_two_bundles_of_one_name_refuse_to_start(pair: Path, settings: MakeSettings) -> None:
    reseal(pair, name=NAME)
    with pytest.raises(BundleError, match=f"two bundles are named {NAME}"):
        open_in(pair.parent, settings)


def test_an_empty_folder_refuses_to_start(tmp_path: Path, settings: MakeSettings) -> None:
    with pytest.raises(BundleError, match=f"{tmp_path} holds no bundle"):
        open_in(tmp_path, settings)


def test_a_folder_that_is_none_refuses_to_start(tmp_path: Path, settings: MakeSettings) -> None:
    with pytest.raises(BundleError, match="SERVICE_BUNDLES"):
        open_in(tmp_path / "nowhere", settings)


def test_files_beside_the_bundles_are_not_bundles(bundle_copy: Path, settings: MakeSettings) -> None:
    (bundle_copy.parent / "LICENSES.md").write_text("# Licences\n")
    assert len(open_in(bundle_copy.parent, settings).endpoints) == 1


def test_a_hidden_folder_is_left_alone(pair: Path, settings: MakeSettings) -> None:
    pair.rename(pair.with_name(".second"))
    assert [endpoint.manifest.name for endpoint in open_in(pair.parent, settings).endpoints] == [NAME]


@pytest.mark.anyio
async def test_a_catalog_is_ready_between_start_and_drain(tiny_bundle: Path, settings: MakeSettings) -> None:
    catalog = open_in(tiny_bundle.parent, settings)
    with pytest.raises(NotReady):
        catalog.check_ready()
    catalog.start()
    catalog.check_ready()
    await catalog.drain()
    with pytest.raises(NotReady):
        catalog.check_ready()
    catalog.close()


@pytest.mark.anyio
async def test_drain_gives_up_on_what_takes_too_long(
    tiny_bundle: Path, settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = open_catalog(settings(drain_seconds=0.01), Metrics())
    catalog.start()
    ticket = catalog.get(NAME)._batcher.admit(1000)
    await catalog.drain()
    assert isinstance(ticket.future.exception(), NotReady)
    assert "unanswered" in caplog.text
    catalog.close()


@pytest.mark.anyio
async def test_the_wait_for_replaced_models_is_bounded(tiny_bundle: Path, settings: MakeSettings) -> None:
    catalog = open_catalog(settings(drain_seconds=0.01), Metrics())
    catalog.start()
    catalog.get(NAME)._batcher.admit(1000)  # a request whose answer never comes
    catalog.swap([], fallback={})
    with pytest.raises(NotReady, match=r"1 models .* after 0\.01 s"):
        await catalog.wait_for_retired()
    await catalog.drain()
    catalog.close()
