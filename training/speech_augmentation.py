"""Augmentation of log-mel features on whole batches.

Features are (B, T, F), normalised, so that 0 is the mean. Chance comes from the generator that is handed in, on the
CPU, so that a seed means the same features everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class SpeechAugmentation:
    """How strongly features are varied; 0 turns a step off.

    Attributes:
        level: standard deviation of what is added to all features of a recording: how loud it was.
        num_band_masks: rectangles over all frames that hide some bands.
        band_mask: most bands that one of them hides.
        time_masks_per_second: rectangles over all bands that hide some frames.
        time_mask: most frames that one of them hides.
    """

    level: float = 0.0
    num_band_masks: int = 0
    band_mask: int = 0
    time_masks_per_second: float = 0.0
    time_mask: int = 0


def augment_features(
    features: Tensor, lengths: Tensor, config: SpeechAugmentation, rng: Generator, *, frames_per_second: float
) -> Tensor:
    """Vary the level, then hide bands and stretches of time behind the mean.

    Args:
        features: (B, T, F), normalised.
        lengths: (B,) int64, how many frames are real.
        config: strengths.
        rng: source of chance, on the CPU.
        frames_per_second: of the features.
    Returns: (B, T, F).
    Source: Park et al. 2019 (SpecAugment), without warping in time; the number of time masks grows with the length, as
        in Park et al. 2020.
    """
    if config.level:
        features = features + config.level * torch.randn(len(features), 1, 1, generator=rng).to(features.device)
    B, T, F = features.shape
    frames, bands = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, F, dtype=torch.bool)
    for i, length in enumerate(lengths.tolist()):
        num_time_masks = round(config.time_masks_per_second * length / frames_per_second)
        frames[i, :length] = _draw_mask(length, num_time_masks, config.time_mask, rng)
        bands[i] = _draw_mask(F, config.num_band_masks, config.band_mask, rng)
    hidden = frames[:, :, None] | bands[:, None]
    return features.masked_fill(hidden.to(features.device), 0.0)


def _draw_mask(size: int, num: int, most: int, rng: Generator) -> Tensor:
    """Mark the positions (size,) that at least one of `num` intervals of up to `most` covers."""
    width = torch.randint(most + 1, (num, 1), generator=rng)
    start = (torch.rand(num, 1, generator=rng) * (size - width + 1).clamp(min=0)).long()
    position = torch.arange(size)
    return ((position >= start) & (position < start + width)).any(dim=0)
