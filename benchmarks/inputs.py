"""Pictures to send: 256x256 JPEG files cut from the photos in `samples/`, the same at every call."""

import io

import numpy as np
from PIL import Image

from export.pictures import PHOTOS, SAMPLES

SEED = 11
SIDE_PIXELS = 256
QUALITY = 85
NUM_PICTURES = 48


def cut_jpegs() -> list[bytes]:
    """Cut random squares from the sample photos and save them as JPEG."""
    rng = np.random.default_rng(SEED)
    photos = [Image.open(SAMPLES / name).convert("RGB") for name in PHOTOS]
    files = []
    for index in range(NUM_PICTURES):
        photo = photos[index % len(photos)]
        side = int(rng.integers(min(photo.size) // 3, min(photo.size) + 1))
        left, top = (int(rng.integers(extent - side + 1)) for extent in photo.size)
        box = (left, top, left + side, top + side)
        file = io.BytesIO()
        photo.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC, box=box).save(file, "JPEG", quality=QUALITY)
        files.append(file.getvalue())
    return files
