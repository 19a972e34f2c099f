import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, ValidationError

from service.errors import InvalidInput, ModelFailed, NotAcceptable
from service.sample import Arrays, Sample
from service.tasks import TASKS
from service.tasks.explanations import ClusteredStage, ExplanationSpec, find_clusters
from service.tasks.image_classification import (
    IMAGE_CLASSIFICATION,
    ImageClassificationOptions,
    ImageClassificationResult,
    ImageClassificationSpec,
)

LABELS = ("plane", "car", "bird", "cat", "deer", "dog")
SAMPLE = Sample(inputs={}, length=1, context=None)


def make_spec(labels: tuple[str, ...] = LABELS) -> ImageClassificationSpec:
    return ImageClassificationSpec(
        height=24, width=32, resize_shorter_side=32, interpolation="bilinear", max_pixels=10_000, labels=labels
    )


def classify(
    logits: list[float], top_k: int | None = None, labels: tuple[str, ...] = LABELS
) -> ImageClassificationResult:
    return IMAGE_CLASSIFICATION.postprocess(
        {"logits": np.array(logits, np.float32)},
        SAMPLE,
        make_spec(labels),
        ImageClassificationOptions(top_k=top_k),
        model="paca",
        version="1",
    )


def test_the_task_is_registered_under_its_name() -> None:
    assert TASKS[IMAGE_CLASSIFICATION.name] is IMAGE_CLASSIFICATION


def test_a_picture_becomes_the_input_named_image() -> None:
    file = io.BytesIO()
    Image.new("RGB", (100, 80), (10, 200, 30)).save(file, "PNG")
    sample = IMAGE_CLASSIFICATION.decode(file.getvalue(), "image/png", make_spec())
    assert list(sample.inputs) == ["image"]
    np.testing.assert_array_equal(sample.inputs["image"], np.full((24, 32, 3), (10, 200, 30), np.uint8), strict=True)
    assert (sample.length, sample.context) == (1, None)


def test_the_first_bytes_decide_whatever_media_type_was_named() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "GIF")
    sample = IMAGE_CLASSIFICATION.decode(file.getvalue(), "image/png", make_spec())
    assert sample.inputs["image"].shape == (24, 32, 3)


def test_only_the_logits_are_asked_for() -> None:
    assert IMAGE_CLASSIFICATION.outputs(ImageClassificationOptions(), make_spec()) == ("logits",)


def test_scores_are_the_softmax_of_the_logits() -> None:
    logits = [1.5, -2.0, 0.25, 3.0, 2.75, -10.0]
    result = classify(logits, top_k=6)
    expected = np.exp(np.array(logits)) / np.exp(np.array(logits)).sum()
    assert [prediction.index for prediction in result.predictions] == [3, 4, 0, 2, 1, 5]
    for prediction in result.predictions:
        assert prediction.label == LABELS[prediction.index]
        assert prediction.score == pytest.approx(expected[prediction.index], rel=1e-12)
    assert sum(prediction.score for prediction in result.predictions) == pytest.approx(1, rel=1e-12)


def test_large_logits_do_not_overflow() -> None:
    best, second, *_ = classify([-3e38, 0, 3e38, 3e38, 0, 0]).predictions
    assert (best.index, best.score) == (2, 0.5)
    assert (second.index, second.score) == (3, 0.5)


def test_of_equal_logits_the_lower_index_comes_first() -> None:
    assert [prediction.index for prediction in classify([0, 1, 0, 1, 1, 0], top_k=6).predictions] == [1, 3, 4, 0, 2, 5]


def test_logits_rank_where_scores_underflow() -> None:
    assert [prediction.index for prediction in classify([0, -2000, -1000, 0.5, -3000, -1], top_k=6).predictions] == [
        3, 0, 5, 2, 1, 4,
    ]  # fmt: skip


def test_five_classes_are_returned_by_default_or_all_where_there_are_fewer() -> None:
    assert len(classify([0] * 6).predictions) == 5
    assert len(classify([0] * 3, labels=LABELS[:3]).predictions) == 3


def test_top_k_says_how_many_classes_are_returned() -> None:
    assert len(classify([0] * 6, top_k=1).predictions) == 1
    assert len(classify([0] * 6, top_k=6).predictions) == 6


def test_the_answer_names_its_model_and_version() -> None:
    assert classify([0, 9, 0, 0, 0, 0], top_k=1).model_dump(exclude_none=True) == {
        "model": "paca",
        "version": "1",
        "predictions": [{"label": "car", "index": 1, "score": pytest.approx(1, abs=1e-3)}],
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_the_model_s_failure(value: float) -> None:
    with pytest.raises(ModelFailed, match="finite"):
        classify([0, value, 0, 0, 0, 0])


def test_a_wrong_number_of_logits_is_the_model_s_failure() -> None:
    with pytest.raises(ModelFailed):
        classify([0, 1, 2])


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_no_option(top_k: int) -> None:
    with pytest.raises(ValidationError):
        ImageClassificationOptions(top_k=top_k)


def test_top_k_above_the_number_of_classes_is_refused_with_the_remedy() -> None:
    IMAGE_CLASSIFICATION.check_options(ImageClassificationOptions(top_k=6), make_spec())
    with pytest.raises(InvalidInput) as caught:
        IMAGE_CLASSIFICATION.check_options(ImageClassificationOptions(top_k=7), make_spec())
    assert str(caught.value) == "top_k is 7; this model has 6 classes; ask for 1 to 6 of them"


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValidationError):
        ImageClassificationOptions.model_validate({"topk": 3})


def test_a_spec_needs_labels() -> None:
    with pytest.raises(ValidationError):
        make_spec(labels=())


@pytest.mark.parametrize("model", [ImageClassificationSpec, ImageClassificationOptions, ImageClassificationResult])
def test_every_field_is_described(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    for part in [schema, *schema.get("$defs", {}).values()]:
        assert all("description" in field for field in part["properties"].values())


# Explanations

EXPLAIN = ImageClassificationOptions(explain="clusters", top_k=1)
PATCH_CLUSTERS = ExplanationSpec(
    kind="patch_clusters", stages=(ClusteredStage(stage=1, grid=(6, 8)), ClusteredStage(stage=2, grid=(3, 4)))
)
TOKEN_REGIONS = ExplanationSpec(kind="token_regions", stages=(ClusteredStage(stage=2, grid=(6, 8)),))


def make_explained_spec(explanation: ExplanationSpec | None = PATCH_CLUSTERS) -> ImageClassificationSpec:
    return make_spec().model_copy(update={"explanation": explanation})


def make_explained_outputs() -> Arrays:
    rng = np.random.default_rng(2)
    evidence = rng.normal(size=(len(LABELS), 3, 4))
    evidence[4] += 1
    clusters = {f"clusters_stage{stage}": rng.dirichlet(np.ones(size), 5) for stage, size in ((1, 48), (2, 12))}
    return {"logits": evidence.sum((1, 2)), "evidence": evidence} | clusters


def make_body() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (80, 100, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def explain(outputs: Arrays, spec: ImageClassificationSpec) -> ImageClassificationResult:
    sample = IMAGE_CLASSIFICATION.decode(make_body(), "", spec)
    return IMAGE_CLASSIFICATION.postprocess(outputs, sample, spec, EXPLAIN, model="paca", version="1")


def open_png(data: Any) -> Image.Image:
    assert data["media_type"] == "image/png"
    return Image.open(io.BytesIO(base64.b64decode(data["data"])))


def test_an_explanation_names_the_heaviest_clusters_of_each_stage_for_the_predicted_class() -> None:
    outputs, spec = make_explained_outputs(), make_explained_spec()
    found = explain(outputs, spec).model_dump(exclude_none=True)
    assert found["predictions"][0]["label"] == found["explanation"]["label"] == "deer"
    expected = find_clusters(outputs, PATCH_CLUSTERS, target=4)
    for stage, one in zip(found["explanation"]["stages"], expected, strict=True):
        assert list(stage) == ["stage", "grid", "clusters"]
        assert (stage["stage"], stage["grid"]) == (one.stage, one.grid)
        assert [(c["index"], c["weight"]) for c in stage["clusters"]] == [
            (c.number, round(c.weight, 6)) for c in one.clusters
        ]
        pictures = [open_png(c["heat_map"]) for c in stage["clusters"]]
        assert {picture.size for picture in pictures} == {(384, 307)}  # 100 x 80 pixels, enlarged
        assert len({picture.tobytes() for picture in pictures}) == 3


def test_an_explanation_by_tokens_tells_their_regions() -> None:
    cells = np.arange(48, dtype=np.int32) // 12
    outputs = {"logits": np.arange(6.0), "clusters_stage2": cells}
    found = explain(outputs, make_explained_spec(TOKEN_REGIONS)).model_dump(exclude_none=True)["explanation"]
    assert found["label"] == "dog"
    assert [list(stage) for stage in found["stages"]] == [["stage", "grid", "tokens", "regions"]]
    assert found["stages"][0]["tokens"] == [0.25] * 4
    assert open_png(found["stages"][0]["regions"]).size == (384, 307)


@pytest.mark.parametrize("explanation", [PATCH_CLUSTERS, TOKEN_REGIONS])
def test_an_explanation_is_drawn_as_one_picture(explanation: ExplanationSpec) -> None:
    spec = make_explained_spec(explanation)
    IMAGE_CLASSIFICATION.check_drawing(EXPLAIN, spec)
    sample = IMAGE_CLASSIFICATION.decode(make_body(), "", spec)
    outputs = make_explained_outputs()
    if explanation is TOKEN_REGIONS:
        outputs["clusters_stage2"] = np.arange(48, dtype=np.int32) // 12
    picture = Image.open(io.BytesIO(IMAGE_CLASSIFICATION.draw(outputs, sample, spec, EXPLAIN)))
    assert picture.format == "PNG"
    assert picture.width > 500


def test_only_an_explanation_asks_for_more_than_the_logits() -> None:
    spec = make_explained_spec()
    assert IMAGE_CLASSIFICATION.outputs(ImageClassificationOptions(), spec) == ("logits",)
    assert IMAGE_CLASSIFICATION.outputs(EXPLAIN, spec) == (
        "logits", "evidence", "clusters_stage1", "clusters_stage2",
    )  # fmt: skip


def test_an_answer_that_is_not_explained_has_no_word_of_it() -> None:
    spec = make_explained_spec()
    sample = IMAGE_CLASSIFICATION.decode(make_body(), "", spec)
    outputs = {"logits": np.arange(6.0)}
    result = IMAGE_CLASSIFICATION.postprocess(
        outputs, sample, spec, ImageClassificationOptions(), model="paca", version="1"
    )
    assert set(result.model_dump(exclude_none=True)) == {"model", "version", "predictions"}


def test_a_model_that_tells_no_clusters_refuses_to_explain() -> None:
    with pytest.raises(InvalidInput, match="this model tells no clusters"):
        IMAGE_CLASSIFICATION.check_options(EXPLAIN, make_spec())
    IMAGE_CLASSIFICATION.check_options(EXPLAIN, make_explained_spec())


def test_without_an_explanation_there_is_nothing_to_draw() -> None:
    with pytest.raises(NotAcceptable, match="explain=clusters"):
        IMAGE_CLASSIFICATION.check_drawing(ImageClassificationOptions(), make_explained_spec())


def test_evidence_that_is_not_finite_is_the_model_s_failure() -> None:
    outputs = make_explained_outputs()
    outputs["evidence"] = outputs["evidence"] * np.nan
    with pytest.raises(ModelFailed):
        explain(outputs, make_explained_spec())
