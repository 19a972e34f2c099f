"""Pictures of 40 megapixels: their masks are made in bounded memory. In a process of its own, as peaks stay."""

import io
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.service.tasks.test_pictures import make_png, png_chunk

WIDTH, HEIGHT = 7_300, 5_479  # 39,996,700 pixels
MEASURE = """
import sys
from pathlib import Path
import numpy as np
from service.tasks.image_segmentation import IMAGE_SEGMENTATION, ImageSegmentationOptions, ImageSegmentationSpec
def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
path, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stages = [{"stage": 1, "grid": (90, 120)}, {"stage": 2, "grid": (45, 60)}]
spec = ImageSegmentationSpec(
    height=360, width=480, fill=(0, 0, 0), max_pixels=40_000_000, labels=tuple("abcdefghijk"),
    explanation={"kind": "patch_clusters", "stages": stages},
)
logits = np.random.default_rng(0).normal(size=(11, 90, 120)).astype(np.float32)
fine = np.random.default_rng(1).random((64, 90, 120), np.float32)
clusters = {
    "clusters_stage1": fine.reshape(64, -1),
    "clusters_stage2": fine.reshape(64, 45, 2, 60, 2).mean((2, 4)).reshape(64, -1),
}
body = open(path, "rb").read()
before = peak()
sample = IMAGE_SEGMENTATION.decode(body, "", spec)
options = ImageSegmentationOptions(explain=sys.argv[4])
result = IMAGE_SEGMENTATION.postprocess(clusters | {"logits": logits}, sample, spec, options, model="", version="")
result.model_dump_json()
if options.explain == "clusters":
    assert all(len(stage.clusters) == 4 for stage in result.explanation.stages)
    IMAGE_SEGMENTATION.draw(clusters | {"logits": logits}, sample, spec, options)
assert (result.height, result.width) == (height, width) and len(result.classes) == 11
print(peak() - before)
"""


def make_large_png() -> bytes:
    """RGB, the largest that Pillow makes of it: 4 bytes a pixel."""
    pack = zlib.compressobj(1)
    row = bytes(1 + 3 * WIDTH)
    data = b"".join([*(pack.compress(row * 100) for _ in range(HEIGHT // 100)), pack.compress(row * (HEIGHT % 100))])
    header = make_png(WIDTH, HEIGHT, kind=2)[:33]
    return header + png_chunk(b"IDAT", data + pack.flush()) + png_chunk(b"IEND", b"")


def make_large_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("L", (WIDTH, HEIGHT), 90).save(file, "JPEG")
    return file.getvalue()


# A PNG is decoded in full, 160 MB, a JPEG at an eighth of its sides; then the mask has 40 MB. To explain, the picture
# is decoded again, beside the mask.
@pytest.mark.parametrize(
    ("make", "explain", "most"),
    [(make_large_png, "none", 220e6), (make_large_jpeg, "none", 100e6), (make_large_png, "clusters", 280e6)],
    ids=["PNG", "JPEG", "explained"],
)
def test_a_picture_of_40_megapixels_gets_its_mask_in_bounded_memory(
    tmp_path: Path, make: Callable[[], bytes], explain: str, most: float
) -> None:
    path = tmp_path / "picture"
    path.write_bytes(make())
    command = [sys.executable, "-c", MEASURE, str(path), str(HEIGHT), str(WIDTH), explain]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert 40e6 < float(done.stdout) < most
