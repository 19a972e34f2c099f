"""Natural pictures for golden vectors and parity, from the photos in `samples/`, so that exports need no data set."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.tasks.pictures import PictureSpec, decode_picture

SAMPLES = Path("samples")
PHOTOS = ("photo_cat_cc0.jpg", "photo_coffee_cc0.jpg", "photo_building_ccby2.jpg")
SEED = 7

Pixels = npt.NDArray[np.uint8]


def read_photos(spec: PictureSpec) -> Pixels:
    """Decode the sample photos as the service does: (3, Y, X, 3) uint8."""
    return np.stack([decode_picture((SAMPLES / name).read_bytes(), spec) for name in PHOTOS])


def cut_crops(spec: PictureSpec, number: int) -> Pixels:
    """Cut random squares from the sample photos and resize them: (number, Y, X, 3) uint8, the same at every call."""
    rng = np.random.default_rng(SEED)
    photos = [Image.open(SAMPLES / name).convert("RGB") for name in PHOTOS]
    crops = []
    for index in range(number):
        photo = photos[index % len(photos)]
        side = int(rng.integers(min(photo.size) // 4, min(photo.size) + 1))
        left, top = (int(rng.integers(extent - side + 1)) for extent in photo.size)
        size, box = (spec.width, spec.height), (left, top, left + side, top + side)
        crops.append(np.asarray(photo.resize(size, Image.Resampling.BICUBIC, box=box)))
    return np.stack(crops)
