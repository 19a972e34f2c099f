from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from training.speech_augmentation import SpeechAugmentation, augment_features

NOTHING = SpeechAugmentation()
EVERYTHING = SpeechAugmentation(level=0.5, num_band_masks=2, band_mask=5, time_masks_per_second=2.0, time_mask=7)
LENGTHS = torch.tensor([200, 120, 3, 0])


def features() -> Tensor:
    return torch.randn(4, 200, 16, generator=Generator().manual_seed(5)) + 3.0


def augmented(config: SpeechAugmentation, seed: int = 0) -> Tensor:
    rng = Generator().manual_seed(seed)
    return augment_features(features(), LENGTHS, config, rng, frames_per_second=100.0)


def test_no_strength_means_no_change() -> None:
    torch.testing.assert_close(augmented(NOTHING), features(), atol=0, rtol=0)


def test_the_same_seed_gives_the_same_features_and_another_seed_others() -> None:
    torch.testing.assert_close(augmented(EVERYTHING), augmented(EVERYTHING), atol=0, rtol=0)
    assert augmented(EVERYTHING).ne(augmented(EVERYTHING, seed=1)).any()


def test_the_level_moves_all_features_of_a_recording_alike() -> None:
    moved = augmented(replace(NOTHING, level=0.5)) - features()
    torch.testing.assert_close(moved, moved[:, :1, :1].expand_as(moved), atol=1e-5, rtol=0)
    assert len(moved[:, 0, 0].unique()) == 4


@pytest.mark.parametrize("seed", range(5))
def test_bands_are_hidden_for_all_time_and_time_for_all_bands(seed: int) -> None:
    is_hidden = augmented(replace(EVERYTHING, level=0.0), seed) == 0.0
    bands, frames = is_hidden.all(dim=1), is_hidden.all(dim=2)
    assert torch.equal(is_hidden, bands[:, None] | frames[:, :, None])
    assert bands.sum(dim=1).max() <= 2 * 5
    assert frames.sum(dim=1)[0] <= 4 * 7  # two seconds
    assert not frames[1, 120:].any()  # padding is left alone
    assert not frames[3].any()


def test_time_is_hidden_in_proportion_to_the_length() -> None:
    config = replace(NOTHING, time_masks_per_second=3.0, time_mask=10)
    num_hidden = sum((augmented(config, seed) == 0.0).all(dim=2).sum(dim=1) for seed in range(40))
    assert isinstance(num_hidden, Tensor)
    assert 0.7 < float(num_hidden[0] / num_hidden[1]) * 120 / 200 < 1.3
