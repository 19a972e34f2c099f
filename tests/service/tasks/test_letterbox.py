import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from service.errors import InvalidInput
from service.tasks.letterbox import LetterboxSpec, decode_letter, decode_to_fit, fit
from tests.service.tasks.test_pictures import make_exif, make_jpeg_of_size, make_picture, make_png, save

FILL = (9, 99, 199)


def make_spec(height: int = 36, width: int = 48, max_pixels: int = 4_000_000) -> LetterboxSpec:
    return LetterboxSpec(height=height, width=width, fill=FILL, max_pixels=max_pixels)


@pytest.mark.parametrize("name", ["PNG", "JPEG"])
def test_a_picture_of_the_right_size_keeps_its_pixels(name: str) -> None:
    body = save(make_picture(48, 36), name)
    letter = decode_letter(body, make_spec())
    expected = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
    np.testing.assert_array_equal(letter.pixels, expected, strict=True)
    assert (letter.size, letter.box) == ((36, 48), (36, 48))
    assert letter.pixels.flags.c_contiguous


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((36, 48), (36, 48)),
        ((360, 480), (36, 48)),
        ((9, 12), (36, 48)),
        ((100, 100), (36, 36)),
        ((200, 50), (36, 9)),
        ((100, 1600), (3, 48)),
        ((1, 3000), (1, 48)),
        ((3000, 1), (36, 1)),
        ((1, 1), (36, 36)),
    ],
    ids=str,
)
def test_the_whole_picture_is_fitted_and_the_rest_filled(size: tuple[int, int], box: tuple[int, int]) -> None:
    picture = make_picture(size[1], size[0])
    letter = decode_letter(save(picture, "PNG"), make_spec())
    assert (letter.size, letter.box) == (size, box)
    expected = np.asarray(picture.resize(box[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(letter.pixels[: box[0], : box[1]], expected)
    rest = np.ones((36, 48), bool)
    rest[: box[0], : box[1]] = False
    assert (letter.pixels[rest] == FILL).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(60, 40), (640, 200)])
def test_a_turned_picture_is_made_upright(orientation: int, size: tuple[int, int]) -> None:
    photo = make_picture(size[0] // 5, size[1] // 5).resize(size, Image.Resampling.BICUBIC)
    body = save(photo, "JPEG", quality=95, exif=make_exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    letter = decode_letter(body, make_spec())
    expected = decode_letter(save(upright, "PNG"), make_spec())
    assert (letter.size, letter.box) == (upright.size[::-1], expected.box)
    assert np.abs(letter.pixels.astype(float) - expected.pixels).mean() < 3  # a large JPEG is decoded at a half or less


def test_transparency_is_put_on_white() -> None:
    letter = decode_letter(save(Image.new("RGBA", (96, 72), (200, 0, 0, 0)), "PNG"), make_spec())
    assert (letter.pixels == 255).all()


@pytest.mark.parametrize("limit", [(20, 20), (500, 300)])
def test_a_picture_is_scaled_up_and_down_to_a_limit(limit: tuple[int, int]) -> None:
    picture = make_picture(80, 60)
    pixels = decode_to_fit(save(picture, "PNG"), limit, max_pixels=4_800)
    size = fit((60, 80), limit)
    assert size in {(15, 20), (225, 300)}
    np.testing.assert_array_equal(pixels, np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)))


def test_no_size_leaves_the_limit_or_vanishes() -> None:
    rng = np.random.default_rng(0)
    for size in (2 ** rng.uniform(0, 16, (2000, 2))).astype(int).tolist():
        for limit in ((36, 48), (7, 480)):
            rows, columns = fit((size[0], size[1]), limit)
            assert 1 <= rows <= limit[0]
            assert 1 <= columns <= limit[1]
            assert (rows, columns)[0] == limit[0] or columns == limit[1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b"no picture", "does not start as a picture"),
        (save(make_picture(60, 40), "JPEG")[:-50], "cut off"),
        (make_png(20_000, 20_000), "20000 x 20000 = 400000000 pixels"),
        (make_jpeg_of_size(3_000, 2_000), "3000 x 2000 = 6000000 pixels"),
    ],
    ids=["empty", "text", "truncated", "PNG too large", "JPEG too large"],
)
def test_bad_pictures_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        decode_letter(body, make_spec())


def test_a_large_jpeg_with_many_scans_is_refused() -> None:
    body = make_jpeg_of_size(7_000, 5_700) + b"\xff\xda" * 30
    with pytest.raises(InvalidInput, match="far longer to decode"):
        decode_letter(body, make_spec(max_pixels=40_000_000))


@pytest.mark.parametrize("change", [{"fill": (0, 0, 256)}, {"fill": (0, 0)}, {"height": 0}, {"mean": 0}])
def test_a_spec_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LetterboxSpec.model_validate({**make_spec().model_dump(), **change})
