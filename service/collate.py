"""Samples → one batch, padded where their lengths differ. Knows nothing of queues or programs."""

from collections.abc import Sequence

import numpy as np

from service.sample import AnyArray, Arrays, Sample

LENGTHS = "lengths"  # the program's input that says how much of each row is real


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """Length up to which samples are batched with this one: the smallest bucket that holds it.

    Args:
        length: of the sample.
        buckets: ascending; empty where all samples have one shape.
    Returns: a bucket; the length itself where there are no buckets.
    Raises: ValueError if the sample is longer than every bucket.
    """
    if not buckets:
        return length
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"length {length} is over the longest bucket {buckets[-1]}")


def scale_max_batch(max_batch: int, bucket: int, buckets: Sequence[int]) -> int:
    """Most samples of a bucket in a batch: as much in all as `max_batch` samples of the first bucket."""
    return max(1, max_batch * buckets[0] // bucket) if buckets else max_batch


def stack(samples: Sequence[Sample]) -> Arrays:
    """Stack samples of one shape: arrays (B, …) by name, not to be written to."""
    return {name: _stack([sample.inputs[name] for sample in samples]) for name in samples[0].inputs}


def pad(samples: Sequence[Sample]) -> Arrays:
    """Stack samples of several lengths, their first axis filled with zeros up to the longest.

    Returns: arrays (B, longest, …) by name, and `lengths`, (B,) int64.
    """
    lengths = np.array([sample.length for sample in samples], dtype=np.int64)
    batch: Arrays = {LENGTHS: lengths}
    for name, first in samples[0].inputs.items():
        rows = np.zeros((len(samples), lengths.max(), *first.shape[1:]), dtype=first.dtype)
        for row, sample in zip(rows, samples, strict=True):
            row[: sample.length] = sample.inputs[name]
        batch[name] = rows
    return batch


def _stack(rows: Sequence[AnyArray]) -> AnyArray:
    # np.stack lets go of the interpreter at every row, and whoever takes it keeps the worker waiting for it.
    joined = b"".join([np.ascontiguousarray(row).data for row in rows])
    return np.frombuffer(joined, rows[0].dtype).reshape(len(rows), *rows[0].shape)
