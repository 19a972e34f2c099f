from typing import Any

import pytest

from export.model_card import render_model_card
from service.bundle import Conversion, Manifest, Parity
from tests.service.tiny_bundle import GOLDEN, PROGRAM, make_facts


def make_manifest(**facts: Any) -> Manifest:
    parity = Parity(
        inputs="17 crops", batch_sizes=(1, 3, 8), max_relative_error={"logits": 3.25e-7, "clusters_stage1": 8.5e-6}
    )
    quality = {"valid": {"accuracy": 0.91234, "top5": 0.99876}, "test_dev": {"accuracy": 0.90001}}
    files = dict.fromkeys((PROGRAM, GOLDEN), "0" * 64)
    return Manifest.model_validate(make_facts() | {"files": files, "parity": parity, "quality": quality} | facts)


def test_the_card_holds_every_number_that_was_measured() -> None:
    manifest = make_manifest()
    card = render_model_card(manifest)
    for split, metrics in manifest.quality.items():
        for metric, value in metrics.items():
            assert f"| {split} | {metric} | {value:.4f} |" in card
    for output, error in manifest.parity.max_relative_error.items():
        assert f"{output} {error:.1e}" in card
    for value in (*manifest.parity.batch_sizes, manifest.origin.seed, manifest.version, manifest.parity.inputs):
        assert str(value) in card


def test_the_card_tells_how_many_rows_are_off_where_some_may_be() -> None:
    parity = make_manifest().parity
    assert "differ by more" not in render_model_card(make_manifest())
    parity = parity.model_copy(update={"share_of_rows_off": {"log_probs": 0.01234, "clusters": 0.0}})
    assert "fell differently: log_probs 1.23%, clusters 0.00%; 17 crops" in render_model_card(
        make_manifest(parity=parity)
    )


@pytest.mark.parametrize("field", ["command", "recipe", "hardware", "data", "data_license", "architecture"])
def test_the_card_tells_where_the_weights_come_from(field: str) -> None:
    origin = make_facts()["origin"].model_copy(update={field: "a fact that stands nowhere else"})
    assert "a fact that stands nowhere else" in render_model_card(make_manifest(origin=origin))


@pytest.mark.parametrize("field", ["description", "limits", "license", "notice"])
def test_the_card_tells_what_the_manifest_tells(field: str) -> None:
    assert "told only here" in render_model_card(make_manifest(**{field: "told only here"}))


def test_the_card_of_converted_weights_tells_their_file_and_claims_no_training_and_no_quality() -> None:
    fields = {name: f"the {name} of it" for name in Conversion.model_fields}
    card = render_model_card(make_manifest(origin=Conversion(**fields), quality={}))
    for told in (*fields.values(), "converted, not trained here", "Not measured here."):
        assert told in card, told
    for untold in ("Seed", "Training", "Recipe", "| split |"):
        assert untold not in card, untold
