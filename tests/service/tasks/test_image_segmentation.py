import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from service.errors import ModelFailed, NotAcceptable
from service.sample import Sample
from service.tasks import TASKS
from service.tasks.image_segmentation import (
    IMAGE_SEGMENTATION,
    ImageSegmentationOptions,
    ImageSegmentationResult,
    ImageSegmentationSpec,
    RunLengths,
)
from tests.service.tasks.test_pictures import make_exif, make_picture, save

LABELS = ("sky", "road", "car")
LOGITS = np.zeros((3, 6, 8), np.float32)
LOGITS[1, 3:] = 1  # sky above, road below
LOGITS[2, :, 6:] = 2  # and a car on the right


def make_spec(**fields: Any) -> ImageSegmentationSpec:
    usual = {"height": 24, "width": 32, "fill": (1, 2, 3), "max_pixels": 100_000, "labels": LABELS}
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


@pytest.mark.parametrize("options", [{"mask_format": "bmp"}, {"overlay": "perhaps"}, {"top_k": 1}], ids=str)
def test_options_that_there_are_not_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImageSegmentationOptions.model_validate(options)
