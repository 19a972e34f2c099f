"""Masks: a program's scores on a coarse grid → the class of each pixel of a picture of any size, and its encodings.

Scores are interpolated bilinearly, with pixel centres in the middle of pixels, as PyTorch's `interpolate` with
`align_corners=False`. Of equal scores the lowest class wins. Memory beside the mask itself is bounded, as
interpolated scores exist for a part of the picture only.
"""

import io
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.tasks.letterbox import Size

Mask = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float32]

_MAX_NUMBERS = 1 << 20  # interpolated scores at a time; 4 MiB


class _Axis(NamedTuple):
    """Where the pixels of one side of a picture lie on one side of the grid: between two cells each.

    Attributes:
        low, high: (pixels,) int, the cells.
        weight: (pixels,) float32, of the high one.
    """

    low: npt.NDArray[np.intp]
    high: npt.NDArray[np.intp]
    weight: Scores


def find_mask(logits: Scores, extent: tuple[float, float], size: Size) -> Mask:
    """Find the class of each pixel.

    Where all four cells around a pixel have the same winner, so has the pixel: only the others are interpolated.

    Args:
        logits: (L, Y, X), L at most 256.
        extent: rows and columns of the grid that show the picture, from its top left; what lies beyond is not looked
            at, except for the rest of a cell that the picture ends in.
        size: of the picture.
    Returns: of that size.
    """
    num_rows, num_columns = (int(np.ceil(side)) for side in extent)
    grid = np.ascontiguousarray(logits[:, :num_rows, :num_columns].transpose(1, 2, 0))  # (Y, X, L)
    rows, columns = (
        _place(pixels, side, cells) for pixels, side, cells in zip(size, extent, grid.shape[:2], strict=True)
    )
    winners = grid.argmax(axis=2).astype(np.uint8)
    across = winners[:, columns.low]
    mask: Mask = across[rows.low]
    is_edge = across != winners[:, columns.high]
    below = np.arange(1, len(grid) + 1).clip(max=len(grid) - 1)
    is_mixed = is_edge | is_edge[below] | (across != across[below])  # (Y, columns of the picture)
    num_at_once = max(1, _MAX_NUMBERS // len(logits))
    for band, low, high in _bands(rows):
        mixed = np.flatnonzero(is_mixed[low])
        for start in range(0, len(mixed), num_at_once):
            some = mixed[start : start + num_at_once]
            _interpolate(mask, band, some, grid[low], grid[high], rows=rows, columns=columns)
    return mask


def _place(num_pixels: int, extent: float, num_cells: int) -> _Axis:
    centres = (np.arange(num_pixels) + 0.5) * (extent / num_pixels) - 0.5
    centres = centres.clip(0, num_cells - 1)
    low = centres.astype(np.intp)
    return _Axis(low, np.minimum(low + 1, num_cells - 1), (centres - low).astype(np.float32))


def _bands(rows: _Axis) -> Iterator[tuple[slice, int, int]]:
    """Rows of pixels between the same two rows of the grid."""
    starts = np.flatnonzero(np.diff(rows.low, prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows.low)], strict=True):
        yield slice(start, end), int(rows.low[start]), int(rows.high[start])


def _interpolate(
    mask: Mask, band: slice, mixed: npt.NDArray[np.intp], low: Scores, high: Scores, *, rows: _Axis, columns: _Axis
) -> None:
    """Fill the columns `mixed` of a band; low, high: (X, L), the rows of the grid around it."""
    left, right, weight = columns.low[mixed], columns.high[mixed], columns.weight[mixed, None]
    top = low[left] + (low[right] - low[left]) * weight  # (pixels, L)
    step = high[left] + (high[right] - high[left]) * weight - top
    num_at_once = max(1, _MAX_NUMBERS // top.size)
    for start in range(band.start, band.stop, num_at_once):
        some = slice(start, min(start + num_at_once, band.stop))
        scores = top + step * rows.weight[some, None, None]  # (rows, pixels, L)
        mask[some, mixed] = scores.argmax(axis=2)


def count_pixels(mask: Mask, num_classes: int) -> npt.NDArray[np.int64]:
    """Count the pixels of each class, (L,)."""
    counts = np.zeros(num_classes, np.int64)
    pixels = mask.ravel()
    for start in range(0, len(pixels), _MAX_NUMBERS):  # numpy makes 8 bytes of each to count them
        counts += np.bincount(pixels[start : start + _MAX_NUMBERS], minlength=num_classes)
    return counts


def encode_mask(mask: Mask) -> bytes:
    """Write a PNG of 8 bits a pixel whose grey values are the classes."""
    return _encode(Image.fromarray(mask))


def encode_painted_mask(mask: Mask, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Write a PNG whose pixels are classes, each shown in its colour."""
    image = Image.fromarray(mask)
    image.putpalette([value for colour in palette for value in colour])
    return _encode(image)


def _encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_type=zlib.Z_RLE)  # of masks it makes less in less time
    return file.getvalue()


def count_runs(mask: Mask, classes: Sequence[int]) -> list[list[int]]:
    """Run lengths of each class: how many pixels are not of it, then how many are, and so on, column by column.

    Source: uncompressed RLE of COCO's API (`counts`), column-major, starting with what is not of the class.
    """
    pixels = mask.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(pixels)) + 1])
    values = pixels[starts]
    runs = []
    for index in classes:
        is_class = values == index
        is_start = np.diff(is_class, prepend=False)
        runs.append(np.diff(starts[is_start], prepend=0, append=len(pixels)).tolist())
    return runs
