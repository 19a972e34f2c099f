"""Picture augmentation on whole batches, as tensors, so that it costs a small share of a training step.

Every function takes and gives float pictures (B, 3, Y, X) in [0, 1], on any device. Chance comes from the generator
that it is handed, on the CPU, so that a seed means the same pictures everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How strongly training pictures are varied; 0 turns a step off.

    Attributes:
        crop_padding: pixels of reflection around the picture from which a crop of its own size is cut.
        has_flip: whether half of the pictures are mirrored left to right.
        brightness, contrast, saturation: largest relative change.
        cutout: side of a square of the batch's mean colour, pixels; it may lie partly outside the picture.
        cutmix: share of the pictures in which a rectangle is taken from another picture (`cut_mix`).
    """

    crop_padding: int = 0
    has_flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    cutout: int = 0
    cutmix: float = 0.0


def augment(images: Tensor, config: Augmentation, rng: Generator) -> Tensor:
    """Apply every step of the configuration that leaves a picture its label: all but `cutmix`.

    Args:
        images: (B, 3, Y, X) in [0, 1].
        config: strengths.
        rng: source of chance, on the CPU.
    Returns: (B, 3, Y, X), not clipped.
    """
    if config.crop_padding:
        images = _random_crop(images, config.crop_padding, rng)
    if config.has_flip:
        images = torch.where(_uniform(images, rng) < 0.5, images.flip(-1), images)
    images = _jitter(images, config, rng)
    return _cutout(images, config.cutout, rng) if config.cutout else images


def cut_mix(images: Tensor, share: float, rng: Generator) -> tuple[Tensor, Tensor]:
    """Replace a rectangle of some pictures by the same rectangle of the picture before them in the batch.

    The rectangle has the shape of the picture, a uniformly drawn area and centre, and is cut at the border (Yun et al.
    2019, section 3, with alpha = 1).

    Args:
        images: (B, 3, Y, X).
        share: of the pictures, in [0, 1].
        rng: source of chance, on the CPU.
    Returns: pictures (B, 3, Y, X); kept (B,), the share of each picture's area that is still its own.
    """
    B, _, Y, X = images.shape
    side = torch.rand(B, 1, generator=rng).sqrt() * (torch.rand(B, 1, generator=rng) < share)  # of the picture's
    row = _interval(Y, side, torch.rand(B, 1, generator=rng))  # (B, Y)
    column = _interval(X, side, torch.rand(B, 1, generator=rng))  # (B, X)
    foreign = (row[:, :, None] & column[:, None, :])[:, None].to(images.device)  # (B, 1, Y, X)
    return torch.where(foreign, images.roll(1, dims=0), images), 1.0 - foreign.float().mean(dim=(1, 2, 3))


def _interval(size: int, share: Tensor, centre: Tensor) -> Tensor:
    """Mark the pixels of a line that lie in an interval: share (B, 1) long around centre (B, 1), both of the line."""
    return ((torch.arange(size) + 0.5) / size - centre).abs() < share / 2


def resize(images: Tensor, side: int) -> Tensor:
    """Resize square pictures (B, 3, Y, Y) to (B, 3, side, side), antialiased."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def _uniform(images: Tensor, rng: Generator) -> Tensor:
    """Draw one number in [0, 1) for each picture: (B, 1, 1, 1), on the pictures' device."""
    return torch.rand(len(images), 1, 1, 1, generator=rng).to(images.device)


def _random_crop(images: Tensor, padding: int, rng: Generator) -> Tensor:
    B, _, Y, X = images.shape
    padded = F.pad(images, (padding,) * 4, mode="reflect")
    top, left = torch.randint(2 * padding + 1, (2, B, 1), generator=rng)
    rows = (top + torch.arange(Y)).to(images.device)  # (B, Y)
    columns = (left + torch.arange(X)).to(images.device)  # (B, X)
    picture = torch.arange(B, device=images.device)[:, None, None, None]
    channel = torch.arange(3, device=images.device)[None, :, None, None]
    return padded[picture, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _jitter(images: Tensor, config: Augmentation, rng: Generator) -> Tensor:
    def factors(strength: float) -> Tensor:
        return 1.0 + strength * (2.0 * _uniform(images, rng) - 1.0)

    if config.saturation:
        grey = images.mean(dim=1, keepdim=True).expand_as(images)
        images = torch.lerp(grey, images, factors(config.saturation))
    if config.contrast:
        mean = images.mean(dim=(1, 2, 3), keepdim=True).expand_as(images)
        images = torch.lerp(mean, images, factors(config.contrast))
    return images * factors(config.brightness) if config.brightness else images


def _cutout(images: Tensor, side: int, rng: Generator) -> Tensor:
    B, _, Y, X = images.shape
    centre_row = torch.randint(Y, (B, 1), generator=rng)
    centre_column = torch.randint(X, (B, 1), generator=rng)
    row = (torch.arange(Y) - centre_row + side // 2) // side == 0  # (B, Y)
    column = (torch.arange(X) - centre_column + side // 2) // side == 0  # (B, X)
    hidden = (row[:, :, None] & column[:, None, :])[:, None].to(images.device)  # (B, 1, Y, X)
    return torch.where(hidden, images.mean(dim=(0, 2, 3), keepdim=True), images)
