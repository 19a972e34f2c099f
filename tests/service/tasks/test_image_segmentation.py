import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from service.errors import InvalidInput, ModelFailed, NotAcceptable
from service.sample import Arrays, Sample
from service.tasks import TASKS
from service.tasks.explanations import ClusteredStage, ExplanationSpec, PatchClusters
from service.tasks.image_segmentation import IMAGE_SEGMENTATION, ImageSegmentationOptions, ImageSegmentationSpec
from service.tasks.mask_explanations import find_mask_clusters
from service.tasks.segmentation_answers import ImageSegmentationResult, RunLengths
from tests.service.tasks.test_pictures import make_exif, make_picture, save

LABELS = ("sky", "road", "car")
LOGITS = np.zeros((3, 6, 8), np.float32)
LOGITS[1, 3:] = 1  # sky above, road below
LOGITS[2, :, 6:] = 2  # and a car on the right


def make_spec(**fields: Any) -> ImageSegmentationSpec:
    usual: dict[str, Any] = {"height": 24, "width": 32, "fill": (1, 2, 3), "max_pixels": 100_000, "labels": LABELS}
    return ImageSegmentationSpec(**usual | fields)


def decode(width: int = 32, height: int = 24, **options: Any) -> Sample:
    body = save(make_picture(width, height), "PNG", **options)
    return IMAGE_SEGMENTATION.decode(body, "image/png", make_spec(max_pixels=4_000_000))


def segment(sample: Sample, logits: Any = LOGITS, **options: Any) -> ImageSegmentationResult:
    return IMAGE_SEGMENTATION.postprocess(
        {"logits": logits}, sample, make_spec(), ImageSegmentationOptions(**options), model="paca", version="1"
    )


def read_mask(result: ImageSegmentationResult) -> Any:
    assert not isinstance(result.mask, RunLengths)
    assert result.mask.media_type == "image/png"
    image = Image.open(io.BytesIO(base64.b64decode(result.mask.data)))
    assert image.mode == "L"
    return np.asarray(image)


def draw(sample: Sample, spec: ImageSegmentationSpec | None = None, **options: Any) -> Image.Image:
    options_ = ImageSegmentationOptions(**options)
    return Image.open(io.BytesIO(IMAGE_SEGMENTATION.draw({"logits": LOGITS}, sample, spec or make_spec(), options_)))


def test_the_task_is_registered_under_its_name() -> None:
    assert TASKS[IMAGE_SEGMENTATION.name] is IMAGE_SEGMENTATION


def test_a_picture_becomes_the_input_named_image() -> None:
    sample = decode(96, 24)
    assert list(sample.inputs) == ["image"]
    assert sample.inputs["image"].shape == (24, 32, 3)
    assert sample.length == 1
    assert (sample.inputs["image"][8:] == (1, 2, 3)).all()


def test_the_answer_tells_the_classes_that_there_are_largest_first() -> None:
    logits = LOGITS[[0, 1, 1]]  # road and car score the same: road
    logits[0] = 0.5
    result = segment(decode(64, 48), logits)
    assert (result.model, result.version, result.height, result.width) == ("paca", "1", 48, 64)
    mask = read_mask(result)
    assert mask.shape == (48, 64)
    assert (mask[:23] == 0).all()
    assert (mask[25:] == 1).all()
    assert [(one.index, one.label) for one in result.classes] == [(0, "sky"), (1, "road")]
    assert sum(one.share for one in result.classes) == 1
    assert result.classes[0].share == (mask == 0).mean()


def test_shares_rank_the_classes_and_equal_ones_the_index() -> None:
    columns = np.zeros((3, 6, 8), np.float32)
    for index, (start, end) in ((2, (0, 4)), (0, (4, 6)), (1, (6, 8))):
        columns[index, :, start:end] = 1
    result = segment(decode(), columns)
    assert [(one.index, one.share) for one in result.classes] == [(2, 0.5), (0, 0.25), (1, 0.25)]


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (5, 4), (1600, 100), (301, 200)], ids=str)
def test_the_mask_has_the_size_of_the_picture_as_sent(size: tuple[int, int]) -> None:
    result = segment(decode(*size))
    assert (result.width, result.height) == size
    assert read_mask(result).shape == size[::-1]


def test_the_mask_is_upright_as_the_picture_is_seen() -> None:
    result = segment(decode(60, 40, exif=make_exif(6)))
    assert (result.width, result.height) == (40, 60)
    assert read_mask(result).shape == (60, 40)


def test_only_the_part_that_shows_the_picture_is_answered() -> None:
    tall = segment(decode(24, 48))  # 12 of 32 columns: three of the grid's eight
    assert set(np.unique(read_mask(tall)).tolist()) == {0, 1}
    assert set(np.unique(read_mask(segment(decode(32, 24)))).tolist()) == {0, 1, 2}


def test_run_lengths_say_the_same_as_the_png() -> None:
    sample = decode(50, 30)
    result = segment(sample, mask_format="rle")
    assert isinstance(result.mask, RunLengths)
    assert result.mask.size == (30, 50)
    mask = read_mask(segment(sample))
    assert list(result.mask.counts) == [0, 1, 2]
    for index, counts in result.mask.counts.items():
        assert sum(counts) == mask.size
        assert sum(counts[1::2]) == (mask == index).sum()
    assert '"counts":{"0":[0,' in result.model_dump_json()


def test_an_overlay_comes_only_if_it_is_asked_for() -> None:
    sample = decode(64, 48)
    assert segment(sample).overlay is None
    overlay = segment(sample, overlay=True).overlay
    assert overlay is not None
    drawn = Image.open(io.BytesIO(base64.b64decode(overlay.data)))
    assert drawn.mode == "RGB"
    assert drawn.tobytes() == draw(sample, overlay=True).tobytes()
    assert max(drawn.size) > 640  # it is enlarged, and has a legend


def test_a_drawing_is_the_mask_in_the_manifest_s_colours() -> None:
    colours = ((0, 0, 255), (90, 90, 90), (255, 0, 0))
    sample = decode(64, 48)
    drawn = draw(sample, make_spec(colours=colours))
    assert drawn.mode == "P"
    mask = np.asarray(drawn)
    np.testing.assert_array_equal(mask, read_mask(segment(sample)))
    np.testing.assert_array_equal(np.asarray(drawn.convert("RGB")), np.array(colours)[mask])


def test_by_default_colours_differ() -> None:
    assert len(set(make_spec().palette)) == len(LABELS)


def test_run_lengths_cannot_be_drawn_but_beside_an_overlay() -> None:
    IMAGE_SEGMENTATION.check_drawing(ImageSegmentationOptions(), make_spec())
    IMAGE_SEGMENTATION.check_drawing(ImageSegmentationOptions(mask_format="rle", overlay=True), make_spec())
    with pytest.raises(NotAcceptable, match="mask_format is rle") as caught:
        IMAGE_SEGMENTATION.check_drawing(ImageSegmentationOptions(mask_format="rle"), make_spec())
    assert str(caught.value).count("; ") == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_the_model_s_failure(value: float) -> None:
    logits = LOGITS.copy()
    logits[1, 2, 3] = value
    with pytest.raises(ModelFailed, match="finite"):
        segment(decode(), logits)


@pytest.mark.parametrize("shape", [(2, 6, 8), (4, 6, 8), (3, 48), (3,), (3, 0, 8)], ids=str)
def test_logits_of_another_shape_are_the_model_s_failure(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelFailed, match="3 classes"):
        segment(decode(), np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colours": [(0, 0, 0)]}, "1 colours for 3 labels"),
        ({"colours": [(0, 0, 0), (1, 1, 1), (0, 0, 256)]}, "less than or equal to 255"),
        ({"labels": ["alone"]}, "at least 2"),
        ({"labels": [str(index) for index in range(257)]}, "at most 256"),
        ({"max_pixels": 100_000_000}, "max_pixels"),
        ({"resize_shorter_side": 24}, "resize_shorter_side"),
    ],
    ids=str,
)
def test_a_spec_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_spec(**change)


@pytest.mark.parametrize(
    "options", [{"mask_format": "bmp"}, {"overlay": "perhaps"}, {"top_k": 1}, {"explain": "tokens"}], ids=str
)
def test_options_that_there_are_not_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImageSegmentationOptions.model_validate(options)


# Explanations

PATCHES = ExplanationSpec(
    kind="patch_clusters", stages=(ClusteredStage(stage=1, grid=(6, 8)), ClusteredStage(stage=2, grid=(3, 4)))
)
TOKENS = ExplanationSpec(kind="token_regions", stages=(ClusteredStage(stage=2, grid=(6, 8)),))
CLUSTERS = np.random.default_rng(6).dirichlet(np.ones(48), 5)
EXPLAINED = {
    "logits": LOGITS,
    "clusters_stage1": CLUSTERS,
    "clusters_stage2": CLUSTERS.reshape(5, 3, 2, 4, 2).sum((2, 4)).reshape(5, 12),
}
REGIONS = {"logits": LOGITS, "clusters_stage2": np.arange(48, dtype=np.int32) // 8}  # each row is a token


def explain(sample: Sample, outputs: Arrays, explanation: ExplanationSpec, **options: Any) -> dict[str, Any]:
    options_ = ImageSegmentationOptions(explain="clusters", **options)
    spec = make_spec(explanation=explanation, max_pixels=4_000_000)
    result = IMAGE_SEGMENTATION.postprocess(outputs, sample, spec, options_, model="paca", version="1")
    return result.model_dump(exclude_none=True)


def draw_explained(sample: Sample, outputs: Arrays, explanation: ExplanationSpec) -> Image.Image:
    options, spec = ImageSegmentationOptions(explain="clusters"), make_spec(explanation=explanation)
    IMAGE_SEGMENTATION.check_drawing(options, spec)
    return Image.open(io.BytesIO(IMAGE_SEGMENTATION.draw(outputs, sample, spec, options)))


def open_png(data: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["data"])))


def test_the_clusters_are_asked_for_only_to_explain() -> None:
    spec, explained = make_spec(explanation=PATCHES), ImageSegmentationOptions(explain="clusters")
    assert IMAGE_SEGMENTATION.outputs(ImageSegmentationOptions(), spec) == ("logits",)
    assert IMAGE_SEGMENTATION.outputs(explained, spec) == ("logits", "clusters_stage1", "clusters_stage2")
    assert IMAGE_SEGMENTATION.outputs(explained, make_spec(explanation=TOKENS)) == ("logits", "clusters_stage2")


def test_a_model_that_tells_no_clusters_explains_nothing() -> None:
    explained = ImageSegmentationOptions(explain="clusters")
    IMAGE_SEGMENTATION.check_options(explained, make_spec(explanation=PATCHES))
    IMAGE_SEGMENTATION.check_options(ImageSegmentationOptions(), make_spec())
    with pytest.raises(InvalidInput, match="tells no clusters") as caught:
        IMAGE_SEGMENTATION.check_options(explained, make_spec())
    assert str(caught.value).count("; ") == 2


def test_each_class_has_the_cluster_that_mattered_most_for_it_in_every_stage() -> None:
    sample = decode(640, 480)
    plain = segment(sample).model_dump(exclude_none=True)
    found = explain(sample, EXPLAINED, PATCHES)
    assert found | {"explanation": None} == plain | {"explanation": None}, "explaining changes no answer"
    labels = [one["label"] for one in found["classes"]]
    targets = {one["index"]: one["label"] for one in found["classes"]}
    expected = find_mask_clusters(EXPLAINED, PATCHES, part=(1.0, 1.0), targets=targets)
    for stage, one in zip(found["explanation"]["stages"], expected, strict=True):
        assert isinstance(one, PatchClusters)
        assert list(stage) == ["stage", "grid", "clusters"]
        assert [(c["index"], c["label"], c["weight"]) for c in stage["clusters"]] == [
            (c.number, c.label, round(c.weight, 6)) for c in one.clusters
        ]
        assert [c["label"] for c in stage["clusters"]] == labels
        pictures = [open_png(c["heat_map"]) for c in stage["clusters"]]
        assert {picture.size for picture in pictures} == {(640, 480)}
        assert len({picture.tobytes() for picture in pictures}) == 3


def test_no_more_than_the_four_largest_classes_are_explained() -> None:
    logits = np.zeros((6, 6, 8), np.float32)
    for index, columns in enumerate((1, 2, 1, 2, 1, 1)):
        start = sum((1, 2, 1, 2, 1, 1)[:index])
        logits[index, :, start : start + columns] = 5
    options, labels = ImageSegmentationOptions(explain="clusters"), tuple("abcdef")
    result = IMAGE_SEGMENTATION.postprocess(
        EXPLAINED | {"logits": logits}, decode(), make_spec(labels=labels, explanation=PATCHES), options,
        model="", version="",
    )  # fmt: skip
    assert len(result.classes) == 6
    assert result.explanation is not None
    for stage in result.explanation.stages:
        assert stage.clusters is not None
        assert [one.label for one in stage.clusters] == [one.label for one in result.classes[:4]]
        assert {one.label for one in stage.clusters} >= {"b", "d"}


def test_token_regions_of_a_scene_are_told_for_the_part_that_shows_it() -> None:
    whole = explain(decode(32, 24), REGIONS, TOKENS)["explanation"]["stages"]
    assert [list(stage) for stage in whole] == [["stage", "grid", "tokens", "regions"]]
    assert whole[0]["tokens"] == pytest.approx([1 / 6] * 6, abs=1e-6)
    wide = explain(decode(64, 24), REGIONS, TOKENS)["explanation"]["stages"][0]  # three of six rows show it
    assert wide["tokens"] == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert open_png(wide["regions"]).size == (384, 144)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((1, 1), (384, 384)), ((1, 700), (1, 700)), ((301, 200), (384, 255)), ((1600, 100), (1024, 64))],
    ids=str,
)
def test_heat_maps_have_the_size_of_the_scene_within_bounds(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    for stage in explain(decode(*size), EXPLAINED, PATCHES)["explanation"]["stages"]:
        assert {open_png(one["heat_map"]).size for one in stage["clusters"]} == {drawn}


@pytest.mark.parametrize(("explanation", "outputs"), [(PATCHES, EXPLAINED), (TOKENS, REGIONS)], ids=["paca", "tokens"])
def test_an_explained_scene_is_drawn_as_one_picture(explanation: ExplanationSpec, outputs: Arrays) -> None:
    for size in ((64, 48), (1, 700), (900, 30)):
        picture = draw_explained(decode(*size), outputs, explanation)
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.width > 500


def test_a_drawing_shows_the_explanation_or_the_overlay() -> None:
    spec = make_spec(explanation=PATCHES)
    IMAGE_SEGMENTATION.check_drawing(ImageSegmentationOptions(explain="clusters", mask_format="rle"), spec)
    both = ImageSegmentationOptions(explain="clusters", overlay=True)
    with pytest.raises(NotAcceptable, match="overlay and explain") as caught:
        IMAGE_SEGMENTATION.check_drawing(both, spec)
    assert str(caught.value).count("; ") == 2
    found = explain(decode(64, 48), EXPLAINED, PATCHES, overlay=True, mask_format="rle")
    assert {"overlay", "explanation"} < set(found)


@pytest.mark.parametrize(
    "clusters", [CLUSTERS[:, :47], np.full((5, 48), np.nan), np.zeros((5, 48))], ids=["47", "nan", "0"]
)
def test_clusters_that_mean_nothing_are_the_model_s_failure(clusters: Any) -> None:
    with pytest.raises(ModelFailed, match="6 x 8 patches"):
        explain(decode(), EXPLAINED | {"clusters_stage1": clusters}, PATCHES)
