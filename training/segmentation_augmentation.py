"""Augmentation of pictures with their masks: crops of random scale, mirrored at random, from whole batches at once.

Chance comes from the generator that it is handed, on the CPU, so that a seed means the same crops everywhere.
"""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def draw_boxes(
    size: tuple[int, int], crop: tuple[int, int], scales: tuple[float, float], *, num: int, rng: Generator
) -> Tensor:
    """Draw the part of a picture that each crop shows.

    The scale's logarithm is uniform, so that halving is as frequent as doubling. A part that is smaller than the
    picture lies inside it; one that is larger contains it.

    Args:
        size: (Y, X) of the pictures.
        crop: (Y, X) of the crops.
        scales: smallest and largest magnification.
        num: of crops, B.
        rng: source of chance, on the CPU.
    Returns: (B, 4) float32: top, left, height, width in pixels of the picture; the boxes of mirrored crops start at
        their right and have a negative width.
    """
    low, high = torch.tensor(scales).log()
    scale = (low + (high - low) * torch.rand(num, generator=rng)).exp()
    place = torch.rand(2, num, generator=rng)
    is_mirrored = torch.rand(num, generator=rng) < 0.5
    height, width = crop[0] / scale, crop[1] / scale
    top, left = place[0] * (size[0] - height), place[1] * (size[1] - width)
    left, width = torch.where(is_mirrored, left + width, left), torch.where(is_mirrored, -width, width)
    return torch.stack([top, left, height, width], dim=1)


def cut_pictures(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes out of pictures and bring them to one size, bilinearly.

    Args:
        images: (B, 3, Y, X) float; what lies outside of them is 0.
        boxes: (B, 4) of `draw_boxes`.
        size: (Y, X) of the results.
    Returns: (B, 3, *size).
    """
    return _sample(images, boxes, size, mode="bilinear")


def cut_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], *, void: int) -> Tensor:
    """Cut boxes out of masks and bring them to one size, by nearest pixel.

    Args:
        masks: (B, Y, X) uint8.
        boxes: (B, 4) of `draw_boxes`.
        size: (Y, X) of the results.
        void: class of what lies outside of the masks.
    Returns: (B, *size) int64.
    """
    shifted = masks[:, None].float() - void  # outside of them sampling gives 0
    return _sample(shifted, boxes, size, mode="nearest")[:, 0].round().long() + void


def _sample(maps: Tensor, boxes: Tensor, size: tuple[int, int], *, mode: str) -> Tensor:
    boxes = boxes.to(maps.device)
    ticks = [(torch.arange(count, device=maps.device) + 0.5) / count for count in size]  # centres of the pixels
    rows, columns = (boxes[:, i, None] + boxes[:, i + 2, None] * ticks[i] for i in (0, 1))  # (B, Y), (B, X)
    rows, columns = 2 * rows / maps.shape[2] - 1, 2 * columns / maps.shape[3] - 1  # as `grid_sample` counts
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)  # (B, Y, X, 2)
    return F.grid_sample(maps, grid, mode=mode, padding_mode="zeros", align_corners=False)
