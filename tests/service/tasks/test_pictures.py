import io
import random
import struct
import time
import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from service.errors import InvalidInput
from service.tasks.pictures import PictureSpec, decode_picture
from tests.service.tasks.damaged_files import damage

Pixels = npt.NDArray[np.uint8]

COLOUR = (200, 100, 50)
LOSSLESS = ["PNG", "BMP", "GIF", "WEBP"]
FORMATS = [*LOSSLESS, "JPEG"]


def make_spec(height: int, width: int, shorter_side: int | None = None, max_pixels: int = 4_000_000) -> PictureSpec:
    return PictureSpec(
        height=height,
        width=width,
        resize_shorter_side=shorter_side or max(height, width),
        interpolation="bilinear",
        max_pixels=max_pixels,
    )


def save(picture: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    if name == "WEBP":
        options = {"lossless": True, "exact": True, **options}
    picture.save(file, name, **options)
    return file.getvalue()


def make_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    return exif.tobytes()


def make_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise that is smooth over about 8 pixels, so that scaling and JPEG keep it."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(width: int, height: int, *chunks: bytes, bits: int = 8, kind: int = 0, data: bytes = b"") -> bytes:
    """Put a PNG together; `data` are the filtered rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(data)),
         png_chunk(b"IEND", b"")]
    )  # fmt: skip


def make_bmp(width: int, height: int, data: bytes, *, compression: int = 0) -> bytes:
    """Put a BMP of 8 bits a pixel together, all palette entries being (3, 2, 1)."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes([1, 2, 3, 0]) * 256 + data


def make_gif(screen: tuple[int, int], frame: tuple[int, int, int, int]) -> bytes:
    """Put a GIF without pixels together; `frame` is left, top, width, height."""
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0, 0, 0) + b"," + struct.pack("<HHHHB", *frame, 0) + b"\x08\x00;"


def make_jpeg_of_size(width: int, height: int) -> bytes:
    """Write another size into the header of a small JPEG."""
    body = save(Image.new("RGB", (8, 8)), "JPEG")
    start = body.index(b"\xff\xc0") + 5
    return body[:start] + struct.pack(">HH", height, width) + body[start + 4 :]


def make_webp_of_size(width: int, height: int) -> bytes:
    """Write another canvas size into the header of a small WebP with metadata."""
    body = save(Image.new("RGB", (8, 8)), "WEBP", exif=make_exif(1))
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return body[:24] + size + body[30:]


def refusal(body: bytes, spec: PictureSpec | None = None) -> str:
    """Decode what must be refused, check the message's three parts, return it."""
    with pytest.raises(InvalidInput) as caught:
        decode_picture(body, spec or make_spec(32, 32))
    message = str(caught.value)
    assert message.count("; ") == 2, message
    assert "PIL" not in message
    assert "0x" not in message
    return message


# Formats and modes


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_picture_of_the_right_size_keeps_its_pixels(name: str) -> None:
    picture = make_picture(40, 32)
    if name == "GIF":
        picture = picture.quantize(64).convert("RGB")
    result = decode_picture(save(picture, name), make_spec(32, 32))
    np.testing.assert_array_equal(result, np.asarray(picture)[:, 4:36], strict=True)
    assert result.flags.c_contiguous


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}], ids=str)
def test_a_jpeg_of_the_right_size_is_what_pillow_decodes(mode: str, options: dict[str, object]) -> None:
    body = save(make_picture(32, 32).convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
    np.testing.assert_array_equal(decode_picture(body, make_spec(32, 32)), expected, strict=True)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in ("PNG", "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")]
    + [("PNG", "LA"), ("GIF", "P"), ("GIF", "L"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("JPEG", "L"), ("JPEG", "CMYK")],
)
@pytest.mark.parametrize("side", [50, 100], ids=["same size", "half size"])
def test_every_mode_keeps_its_colours(name: str, mode: str, side: int) -> None:
    picture = Image.new("RGB", (side, side), COLOUR).convert(mode, dither=Image.Dither.NONE)
    expected = np.full((50, 50, 3), picture.convert("RGB").getpixel((0, 0)), np.uint8)
    result = decode_picture(save(picture, name), make_spec(50, 50))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1 if name == "JPEG" else 0)


def test_black_and_white_is_averaged_to_grey() -> None:
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (64, 32))).convert("1")
    result = decode_picture(save(stripes, "PNG"), make_spec(8, 8))
    np.testing.assert_allclose(result, 127, rtol=0, atol=16)


def test_palette_indices_are_not_averaged() -> None:
    stripes = Image.fromarray(np.tile(np.array([[0, 2]], np.uint8), (64, 32)))
    stripes.putpalette([100, 100, 100, 255, 0, 0, 100, 100, 100])  # index 1, between them, is red
    np.testing.assert_array_equal(decode_picture(save(stripes, "GIF"), make_spec(8, 8)), 100)


def test_a_cmyk_jpeg_of_adobe_keeps_its_colours() -> None:
    body = save(Image.new("CMYK", (32, 32), (10, 200, 30, 0)), "JPEG", quality=95)
    assert b"Adobe" in body
    np.testing.assert_allclose(decode_picture(body, make_spec(32, 32))[0, 0], (245, 55, 225), rtol=0, atol=3)


def test_sixteen_bits_are_scaled_to_eight_not_clipped() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    result = decode_picture(save(Image.fromarray(values), "PNG"), make_spec(256, 256))
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(result, np.repeat(expected[:, :, None], 3, axis=2), strict=True)


@pytest.mark.parametrize(
    ("kind", "pixel"),
    [(2, [0x8080] * 3), (4, [0x8080, 0xFFFF]), (6, [0x8080, 0x8080, 0x8080, 0xFFFF])],
    ids=["RGB", "LA", "RGBA"],
)
def test_sixteen_bits_a_channel_are_read(kind: int, pixel: list[int]) -> None:
    body = make_png(1, 1, bits=16, kind=kind, data=struct.pack(f">x{len(pixel)}H", *pixel))
    np.testing.assert_array_equal(decode_picture(body, make_spec(4, 4)), 0x80)


# Transparency


@pytest.mark.parametrize("name", ["PNG", "WEBP"])
@pytest.mark.parametrize("side", [32, 64], ids=["same size", "half size"])
def test_transparency_is_put_on_white(name: str, side: int) -> None:
    for alpha in (0, 1, 127, 254, 255):
        result = decode_picture(save(Image.new("RGBA", (side, side), (*COLOUR, alpha)), name), make_spec(32, 32))
        expected = (np.array(COLOUR) * alpha + 255 * (255 - alpha)) / 255
        np.testing.assert_allclose(result[0, 0], expected, rtol=0, atol=1)


def test_hidden_colours_do_not_bleed_when_made_smaller() -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, ::2] = (255, 255, 255, 255)
    pixels[:, 1::2] = (255, 0, 0, 0)  # red that nobody sees
    np.testing.assert_array_equal(decode_picture(save(Image.fromarray(pixels), "PNG"), make_spec(16, 16)), 255)


def test_a_bicubic_filter_does_not_wrap_around_on_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = 255
    spec = PictureSpec(height=64, width=64, resize_shorter_side=64, interpolation="bicubic", max_pixels=100)
    np.testing.assert_allclose(decode_picture(save(Image.fromarray(pixels), "PNG"), spec), 255, rtol=0, atol=1)


@pytest.mark.parametrize("name", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(name: str) -> None:
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    np.testing.assert_array_equal(decode_picture(save(picture, name, transparency=1), make_spec(32, 32)), 255)


def test_a_palette_with_degrees_of_transparency_is_put_on_white() -> None:
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    body = save(picture, "PNG", transparency=bytes([0, 51]))
    np.testing.assert_array_equal(decode_picture(body, make_spec(32, 32))[0, 0], (255, 204, 204))


@pytest.mark.parametrize(
    ("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9)), ("I;16", 7 * 257), ("1", 0)], ids=["L", "RGB", "I;16", "1"]
)
def test_a_transparent_colour_is_white(mode: str, colour: int | tuple[int, ...]) -> None:
    body = save(Image.new(mode, (32, 32), colour), "PNG", transparency=colour)
    np.testing.assert_array_equal(decode_picture(body, make_spec(32, 32)), 255)


# Orientation


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_made_upright(name: str, orientation: int) -> None:
    body = save(make_picture(60, 40), name, exif=make_exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")
    expected = decode_picture(save(upright, "PNG"), make_spec(24, 40))
    np.testing.assert_allclose(decode_picture(body, make_spec(24, 40)), expected, rtol=0, atol=1)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_large_turned_photo_is_scaled_and_made_upright(orientation: int) -> None:
    photo = make_picture(30, 20).resize((600, 400), Image.Resampling.BICUBIC)
    body = save(photo, "JPEG", exif=make_exif(orientation), quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")
    expected = decode_picture(save(upright, "PNG"), make_spec(24, 40))
    difference = decode_picture(body, make_spec(24, 40)).astype(float) - expected
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("order", [b"II", b"MM"])
def test_both_byte_orders_of_exif_are_read(order: bytes) -> None:
    sign = "<" if order == b"II" else ">"
    exif = b"Exif\0\0" + order + struct.pack(f"{sign}HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, 3, 0, 0)
    picture = make_picture(32, 32)
    result = decode_picture(save(picture, "PNG", exif=exif), make_spec(32, 32))
    np.testing.assert_array_equal(result, np.asarray(picture)[::-1, ::-1])


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II",
        b"Exif\0\0not a TIFF",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x0f\x01\x02\0\xff\xff\xff\xff\0\0\0\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, 77, 0),
        bytes(range(256)),
    ],
    ids=["empty", "byte order alone", "no TIFF", "directory far off", "entry missing", "orientation 77", "noise"],
)
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_the_picture_as_it_is(name: str, exif: bytes) -> None:
    picture = make_picture(32, 32)
    result = decode_picture(save(picture, name, exif=exif), make_spec(32, 32))
    np.testing.assert_array_equal(result, decode_picture(save(picture, name), make_spec(32, 32)))


def test_exif_after_the_pixels_of_a_png_is_read() -> None:
    picture = make_picture(32, 32)
    body = save(picture, "PNG")
    body = body[:-12] + png_chunk(b"eXIf", make_exif(3).removeprefix(b"Exif\0\0")) + body[-12:]
    np.testing.assert_array_equal(decode_picture(body, make_spec(32, 32)), np.asarray(picture)[::-1, ::-1])


def test_png_text_that_is_named_like_exif_is_not_taken_for_it() -> None:
    text = png_chunk(b"zTXt", b"exif\0\0" + zlib.compress(b"MM"))
    np.testing.assert_array_equal(decode_picture(make_png(1, 1, text, data=b"\0\x21"), make_spec(2, 2)), 0x21)


# Resizing


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (90, 70), (41, 83)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_middle_is_that_of_the_resized_whole(
    width: int, height: int, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    spec = PictureSpec(height=48, width=56, resize_shorter_side=64, interpolation=interpolation, max_pixels=100_000)
    picture = make_picture(width, height)
    scale = 64 / min(width, height)
    x, y = round(width * scale), round(height * scale)
    whole = picture.resize((x, y), Image.Resampling[interpolation.upper()])
    expected = whole.crop(((x - 56) // 2, (y - 48) // 2, (x - 56) // 2 + 56, (y - 48) // 2 + 48))
    result = decode_picture(save(picture, "PNG"), spec)
    assert result.shape == (48, 56, 3)
    # The whole has rounded sides and a rounded crop: up to half a pixel.
    assert np.abs(result.astype(float) - np.asarray(expected)).mean() < 6


def test_pixels_are_only_cut_where_the_shorter_side_fits() -> None:
    picture = make_picture(71, 64)
    result = decode_picture(save(picture, "PNG"), make_spec(48, 56, shorter_side=64))
    np.testing.assert_array_equal(result, np.asarray(picture)[8:56, 7:63])


@pytest.mark.parametrize("side", [64, 65, 127, 128, 255, 500, 1030])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_decoded_at_a_smaller_scale_shows_the_same(side: int, mode: str) -> None:
    picture = make_picture(24, 24).resize((side + side // 3, side), Image.Resampling.BICUBIC).convert(mode)
    body = save(picture, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(body)).convert("RGB")
    expected = decode_picture(save(whole, "PNG"), make_spec(56, 56, shorter_side=64))
    difference = decode_picture(body, make_spec(56, 56, shorter_side=64)).astype(float) - expected
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("shorter_side", [49, 98, 103])  # sizes whose ratios round up and down
def test_rounding_never_carries_the_middle_over_the_edge(shorter_side: int) -> None:
    for side in range(1, 300):
        for size in ((side, side), (side, side + 7)):
            result = decode_picture(save(Image.new("L", size, 9), "BMP"), make_spec(shorter_side, shorter_side))
            assert (result == 9).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_picture_of_one_pixel_gets_an_answer(name: str) -> None:
    result = decode_picture(save(Image.new("RGB", (1, 1), COLOUR), name), make_spec(32, 32))
    np.testing.assert_allclose(result, np.full((32, 32, 3), COLOUR), rtol=0, atol=3 if name == "JPEG" else 0)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (65_535, 2)])
def test_very_long_pictures_are_cut_before_they_are_resized(size: tuple[int, int]) -> None:
    started = time.thread_time()
    for mode in ("L", "RGB", "RGBA"):
        result = decode_picture(save(Image.new(mode, size, "white"), "PNG"), make_spec(224, 224))
        np.testing.assert_array_equal(result, np.full((224, 224, 3), 255, np.uint8), strict=True)
    assert time.thread_time() - started < 2  # resizing all of 1 x 60000 to a width of 224 takes 3 GB


# First frames


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(name: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    body = save(frames[0], name, save_all=True, append_images=frames[1:], duration=100)
    np.testing.assert_array_equal(decode_picture(body, make_spec(32, 32)), np.full((32, 32, 3), (255, 0, 0)))


# Refusals


def test_an_empty_body_is_refused() -> None:
    assert refusal(b"").startswith("the body is empty")


@pytest.mark.parametrize(
    "body",
    [
        b"x",
        b"hello, this is text",
        "größer".encode(),
        b"<svg></svg>",
        b"%PDF-1.7\n",
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"II*\0",
    ],
)
def test_what_is_no_picture_is_refused(body: bytes) -> None:
    assert refusal(body).startswith("the body does not start as a picture does")


@pytest.mark.parametrize("start", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"BM", b"GIF89a"])
@pytest.mark.parametrize("rest", [b"", b"is only text", bytes(200)], ids=["alone", "text", "zeros"])
def test_a_start_alone_is_refused(start: bytes, rest: bytes) -> None:
    assert "damaged" in refusal(start + rest)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_truncated_picture_is_refused(name: str, part: float) -> None:
    body = save(make_picture(100, 80), name)
    refusal(body[: int(len(body) * part)])


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("num_missing", [1, 2, 3, 10, 100])
def test_a_jpeg_whose_end_is_missing_is_refused(options: dict[str, object], num_missing: int) -> None:
    assert "cut off" in refusal(save(make_picture(100, 80), "JPEG", **options)[:-num_missing])


@pytest.mark.parametrize(
    "body",
    [
        make_png(20_000, 20_000),
        make_jpeg_of_size(20_000, 20_000),
        save(Image.new("RGB", (2_500, 2_000)), "WEBP", method=0),
        make_bmp(20_000, 20_000, b""),
        make_gif((20_000, 20_000), (0, 0, 1, 1)),
    ],
    ids=["PNG", "JPEG", "WebP", "BMP", "GIF"],
)
def test_too_many_pixels_are_refused_from_the_header(body: bytes) -> None:
    message = refusal(body)
    assert "000 pixels; this model takes at most 4000000; scale it down" in message


def test_the_message_names_the_size_that_came() -> None:
    expected = "the picture has 20000 x 20000 = 400000000 pixels; this model takes at most 4000000; scale it down"
    assert refusal(make_png(20_000, 20_000)) == expected


def test_as_many_pixels_as_allowed_are_taken() -> None:
    body = save(Image.new("L", (50, 20)), "PNG")
    assert decode_picture(body, make_spec(8, 8, max_pixels=1000)).shape == (8, 8, 3)
    assert "50 x 20 = 1000 pixels" in refusal(body, make_spec(8, 8, max_pixels=999))


@pytest.mark.parametrize(
    "body",
    [
        make_gif((1, 1), (0, 0, 10_000, 10_000)),
        make_gif((1, 1), (0, 0, 65_535, 65_535)),
        make_webp_of_size(20_000, 20_000),
    ],
    ids=["where Pillow warns", "where Pillow refuses", "WebP"],
)
def test_sizes_at_which_pillow_itself_complains_are_refused(body: bytes) -> None:
    assert "scale it down" in refusal(body)


def test_a_decompression_bomb_is_refused_without_decoding() -> None:
    body = make_png(8_000, 8_000, data=bytes(8_001 * 8_000))
    assert len(body) < 70_000
    started = time.thread_time()
    assert "64000000 pixels" in refusal(body)
    assert time.thread_time() - started < 0.2


@pytest.mark.parametrize("size", [(1, 70_000), (70_000, 1)])
def test_a_side_that_is_far_too_long_is_refused(size: tuple[int, int]) -> None:
    assert "a side may have at most 65535" in refusal(save(Image.new("1", size), "PNG"))


def test_a_jpeg_with_endless_scans_is_refused() -> None:
    body = save(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    last_scan = body[body.rindex(b"\xff\xda") : -2]
    decode_picture(body[:-2] + last_scan * 20 + body[-2:], make_spec(32, 32))
    assert "far longer to decode" in refusal(body[:-2] + last_scan * 1000 + body[-2:])


def test_a_run_length_coded_bmp_is_read_unless_it_is_large() -> None:
    row = bytes([32, 1, 0, 0])
    result = decode_picture(make_bmp(32, 32, row * 32 + b"\0\1", compression=1), make_spec(32, 32))
    np.testing.assert_array_equal(result, np.full((32, 32, 3), (3, 2, 1)))
    assert "far longer to decode" in refusal(make_bmp(1_500, 1_500, b"\0\0" * 1_500, compression=1))


@pytest.mark.parametrize("run", [b"\0\2\0\0", b"\0\0"], ids=["moves", "ends of rows"])
def test_a_run_length_coded_bmp_of_empty_runs_is_refused_quickly(run: bytes) -> None:
    started = time.thread_time()
    assert "far longer to decode" in refusal(make_bmp(900, 900, run * 4_000_000, compression=1))
    assert time.thread_time() - started < 0.2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("PNG", png_chunk(b"tEXt", b"k\0v")),
        ("PNG", png_chunk(b"abCd", b"")),
        ("PNG", png_chunk(b"IDAT", b"")),
        ("JPEG", b"\xff\xe5\0\2"),
        ("JPEG", b"\xff\xfe\0\3x"),
        ("JPEG", b"\xff"),
        ("JPEG", b"\xff\xd0"),
        ("GIF", b"!\xfe\1a\0"),
        ("GIF", b"!\x77\1a\0"),
        ("GIF", b"\1"),
    ],
    ids=repr,
)
def test_a_picture_of_millions_of_parts_is_refused_quickly(name: str, part: bytes) -> None:
    body = save(Image.new("L", (32, 32)), name)
    place = {"PNG": 33, "JPEG": 2, "GIF": body.find(b",")}[name]
    started = time.thread_time()
    refusal(body[:place] + part * (12_000_000 // len(part)) + body[place:])
    assert time.thread_time() - started < 1.0  # taking it apart takes many seconds
    assert decode_picture(body[:place] + part * 1_000 + body[place:], make_spec(32, 32)).shape == (32, 32, 3)


def test_a_png_in_ten_thousand_chunks_is_read() -> None:
    noise = np.random.default_rng(0).integers(1, 256, (1_500, 1_501), np.uint8)
    noise[:, 0] = 0  # the filter of each row
    pixels = zlib.compress(noise.tobytes(), 1)
    chunks = [png_chunk(b"IDAT", pixels[start : start + 200]) for start in range(0, len(pixels), 200)]
    assert len(chunks) > 10_000
    body = make_png(1_500, 1_500)[:33] + b"".join(chunks) + png_chunk(b"IEND", b"")
    result = decode_picture(body, make_spec(1_500, 1_500))
    np.testing.assert_array_equal(result[..., 0], noise[:, 1:])


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_metadata_repeated_without_end_are_refused(name: str) -> None:
    segment = b"\xff\xe1" + struct.pack(">H", 24) + b"Exif\0\0" + bytes(16)
    chunk = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    body = save(Image.new("L", (32, 32)), name)
    body = body[:2] + segment * 50_000 + body[2:] if name == "JPEG" else body[:33] + chunk * 1_000 + body[33:]
    started = time.thread_time()
    assert "repeats its metadata" in refusal(body)
    assert time.thread_time() - started < 0.1


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_png_metadata_that_unpack_to_too_much_are_refused(kind: bytes) -> None:
    chunk = png_chunk(kind, b"a\0\0" + zlib.compress(bytes(5_000_000)))
    refusal(make_png(1, 1, chunk, data=b"\0\0"))


@pytest.mark.parametrize("key", [b"transparency", b"bbox", b"interlace", b"exif", b"default_image", b"icc_profile"])
def test_png_text_that_poses_as_a_property_does_no_harm(key: bytes) -> None:
    text = png_chunk(b"tEXt", key + b"\0value")
    for kind, pixel in ((0, b"\0"), (2, b"\0\0\0")):
        try:
            decode_picture(make_png(1, 1, text, kind=kind, data=b"\0" + pixel), make_spec(4, 4))
        except InvalidInput as error:
            assert "damaged" in str(error)  # noqa: PT017


def test_a_damaged_animation_header_is_no_warning() -> None:
    body = make_png(1, 1, png_chunk(b"acTL", bytes(8)), data=b"\0\0")
    assert "damaged" in refusal(body)


def test_the_cause_stays_with_the_error_for_the_log() -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_picture(save(make_picture(32, 32), "JPEG")[:-20], make_spec(32, 32))
    assert isinstance(caught.value.__cause__, OSError)


# Whatever the bytes are


def renew_checksums(png: bytes) -> bytes:
    """Make the chunks of a damaged PNG valid again, so that damage gets past the checksums."""
    data, position = bytearray(png), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return bytes(data)


def fuzz_seeds() -> dict[str, bytes]:
    picture = make_picture(56, 40)
    clear = picture.copy()
    clear.putalpha(picture.getchannel(0))
    exif = make_exif(6)
    return {
        "jpeg": save(picture, "JPEG", exif=exif),
        "jpeg progressive": save(picture, "JPEG", progressive=True),
        "jpeg cmyk": save(picture.convert("CMYK"), "JPEG"),
        "png": save(picture, "PNG", transparency=(1, 2, 3)),
        "png rgba": save(clear, "PNG", exif=exif),
        "png palette": save(picture.quantize(16), "PNG", transparency=bytes(range(16))),
        "png 1": save(picture.convert("1"), "PNG"),
        "png 16": save(Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG"),
        "webp": save(picture, "WEBP", lossless=False, exif=exif),
        "webp lossless": save(clear, "WEBP"),
        "webp animated": save(clear, "WEBP", save_all=True, append_images=[clear.rotate(90)]),
        "bmp": save(picture, "BMP"),
        "bmp rgba": save(clear, "BMP"),
        "bmp palette": save(picture.quantize(256), "BMP"),
        "bmp rle": make_bmp(56, 40, bytes([50, 1, 6, 2, 0, 0]) * 40 + b"\0\1", compression=1),
        "gif": save(picture.quantize(16), "GIF", transparency=3),
        "gif animated": save(
            picture.quantize(16), "GIF", save_all=True, append_images=[picture.rotate(90).quantize(8)]
        ),
    }


@pytest.mark.parametrize("name", fuzz_seeds())
def test_damaged_bytes_give_a_picture_or_invalid_input(name: str) -> None:
    rng = random.Random(name)
    body = fuzz_seeds()[name]
    spec = make_spec(24, 32)
    num_refused = 0
    for _ in range(150):
        damaged = damage(body, rng, header_bytes=(64, 256))
        if name.startswith("png") and rng.random() < 0.7:
            damaged = renew_checksums(damaged)
        try:
            result = decode_picture(damaged, spec)
        except InvalidInput:
            num_refused += 1
        else:
            assert result.shape == (24, 32, 3)
            assert result.dtype == np.uint8
    assert num_refused > 0


# The spec


def test_the_shorter_side_must_hold_what_is_cut_out() -> None:
    with pytest.raises(ValidationError, match="resize_shorter_side=31 must be at least height=32 and width=16"):
        make_spec(32, 16, shorter_side=31)


@pytest.mark.parametrize(
    "change", [{"height": 0}, {"max_pixels": 100_000_000}, {"interpolation": "nearest"}, {"mean": 0}]
)
def test_a_spec_out_of_range_is_refused(change: dict[str, object]) -> None:
    good = make_spec(32, 32).model_dump()
    with pytest.raises(ValidationError):
        PictureSpec.model_validate({**good, **change})
