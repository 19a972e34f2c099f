import numpy as np
import pytest

from service.collate import LENGTHS, bucket_of, pad, stack
from service.sample import Sample


def make_sample(length: int, value: float) -> Sample:
    return Sample(inputs={"frames": np.full((length, 2), value, np.float32)}, length=length, context=None)


@pytest.mark.parametrize(("length", "bucket"), [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_a_sample_goes_into_the_smallest_bucket_that_holds_it(length: int, bucket: int) -> None:
    assert bucket_of(length, (4, 8)) == bucket


def test_without_buckets_samples_of_one_length_belong_together() -> None:
    assert bucket_of(7, ()) == 7


def test_a_sample_longer_than_every_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="length 9 is over the longest bucket 8"):
        bucket_of(9, (4, 8))


def test_stacked_samples_keep_their_order_and_type() -> None:
    samples = [Sample(inputs={"image": np.full((2, 3), i, np.uint8)}, length=1, context=None) for i in range(3)]
    batch = stack(samples)
    expected = np.repeat(np.arange(3, dtype=np.uint8), 6).reshape(3, 2, 3)
    np.testing.assert_array_equal(batch["image"], expected, strict=True)
    assert list(batch) == ["image"]


def test_padding_is_zero_and_lengths_say_what_is_real() -> None:
    batch = pad([make_sample(3, 5.0), make_sample(1, 7.0)])
    expected = np.zeros((2, 3, 2), np.float32)
    expected[0, :3], expected[1, :1] = 5.0, 7.0
    np.testing.assert_array_equal(batch["frames"], expected, strict=True)
    np.testing.assert_array_equal(batch[LENGTHS], np.array([3, 1], np.int64), strict=True)
