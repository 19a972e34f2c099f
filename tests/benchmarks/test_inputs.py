import io

from PIL import Image

from benchmarks.inputs import NUM_PICTURES, SIDE_PIXELS, cut_jpegs


def test_pictures_are_jpegs_of_one_size_and_the_same_every_time() -> None:
    files = cut_jpegs()
    assert len(files) == NUM_PICTURES
    for file in files:
        with Image.open(io.BytesIO(file)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (SIDE_PIXELS, SIDE_PIXELS))
    assert files == cut_jpegs()
