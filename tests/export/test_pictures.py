import numpy as np

from export.pictures import PHOTOS, SAMPLES, cut_crops, read_photos
from service.tasks.pictures import PictureSpec, decode_picture

SPEC = PictureSpec(height=24, width=32, resize_shorter_side=32, interpolation="bicubic", max_pixels=10_000_000)


def test_photos_are_decoded_as_the_service_does() -> None:
    photos = read_photos(SPEC)
    assert photos.shape == (len(PHOTOS), 24, 32, 3)
    for photo, name in zip(photos, PHOTOS, strict=True):
        np.testing.assert_array_equal(photo, decode_picture((SAMPLES / name).read_bytes(), SPEC), strict=True)


def test_crops_are_the_same_at_every_call_and_differ_from_each_other() -> None:
    crops = cut_crops(SPEC, 12)
    np.testing.assert_array_equal(crops, cut_crops(SPEC, 12), strict=True)
    assert crops.shape == (12, 24, 32, 3)
    assert len({crop.tobytes() for crop in crops}) == 12
