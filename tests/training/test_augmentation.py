from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from training.augmentation import Augmentation, augment, cut_mix, resize

EVERYTHING = Augmentation(crop_padding=2, has_flip=True, brightness=0.2, contrast=0.3, saturation=0.4, cutout=3)
NOTHING = Augmentation()


def pictures(num: int = 6, rows: int = 8, columns: int = 10) -> Tensor:
    return torch.rand(num, 3, rows, columns, generator=Generator().manual_seed(7))


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_pictures_keep_their_shape_and_type() -> None:
    augmented = augment(pictures(), EVERYTHING, rng())
    assert (augmented.shape, augmented.dtype) == (pictures().shape, torch.float32)
    assert augmented.isfinite().all()


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others() -> None:
    first = augment(pictures(), EVERYTHING, rng())
    torch.testing.assert_close(augment(pictures(), EVERYTHING, rng()), first, atol=0, rtol=0)
    assert augment(pictures(), EVERYTHING, rng(1)).ne(first).any()


def test_no_strength_means_no_change() -> None:
    torch.testing.assert_close(augment(pictures(), NOTHING, rng()), pictures(), atol=0, rtol=0)


def test_a_crop_is_a_shifted_window_of_the_reflected_picture() -> None:
    images = pictures(num=32)
    cropped = augment(images, replace(NOTHING, crop_padding=2), rng())
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    shifts = set()
    for i in range(len(images)):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(cropped[i], padded[i, :, top : top + 8, left : left + 10])
        ]
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) > 10
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(5))


def test_about_half_of_the_pictures_are_mirrored() -> None:
    images = pictures(num=400)
    flipped = augment(images, replace(NOTHING, has_flip=True), rng())
    is_mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    is_kept = (flipped == images).flatten(1).all(dim=1)
    assert (is_mirrored ^ is_kept).all()
    assert 150 < is_mirrored.sum() < 250


def test_cutout_hides_one_square_per_picture() -> None:
    images = pictures(num=64)
    cut = augment(images, replace(NOTHING, cutout=3), rng())
    is_hidden = (cut != images).any(dim=1)  # (B, Y, X)
    rows, columns = is_hidden.any(dim=2), is_hidden.any(dim=1)
    assert torch.equal(is_hidden, rows[:, :, None] & columns[:, None, :])  # a rectangle
    assert rows.sum(dim=1).max() == columns.sum(dim=1).max() == 3
    assert rows.sum(dim=1).min() >= 2  # the middle of the square lies inside
    fill = images.mean(dim=(0, 2, 3))[None, :, None, None].expand_as(images)
    torch.testing.assert_close(cut, torch.where(is_hidden[:, None], fill, images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", ["brightness", "contrast", "saturation"])
def test_a_colour_change_stays_within_its_strength(step: str) -> None:
    images = pictures(num=64)
    fixed = {
        "brightness": torch.zeros_like(images),
        "contrast": images.mean(dim=(1, 2, 3), keepdim=True).expand_as(images),
        "saturation": images.mean(dim=1, keepdim=True).expand_as(images),
    }[step]  # what the change moves colours away from, or to
    changed = augment(images, replace(NOTHING, **{step: 0.2}), rng())
    factors = ((changed - fixed).square().flatten(1).sum(1) / (images - fixed).square().flatten(1).sum(1)).sqrt()
    torch.testing.assert_close(changed, fixed + factors[:, None, None, None] * (images - fixed), atol=1e-5, rtol=0)
    assert 0.8 - 1e-5 <= factors.min() < 0.85
    assert 1.15 < factors.max() <= 1.2 + 1e-5


def test_resizing_keeps_a_constant_picture_and_averages_when_it_shrinks() -> None:
    torch.testing.assert_close(resize(torch.full((1, 3, 8, 8), 0.3), 6), torch.full((1, 3, 6, 6), 0.3))
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    shrunk = resize(checks.float().expand(1, 3, 8, 8), 2)
    torch.testing.assert_close(shrunk, torch.full((1, 3, 2, 2), 0.5), atol=0.05, rtol=0)


def test_a_picture_that_has_the_size_is_left_alone() -> None:
    images = torch.rand(1, 3, 8, 8)
    assert resize(images, 8) is images


def test_mixing_takes_one_rectangle_of_the_picture_before() -> None:
    images = pictures(num=64)
    mixed, kept = cut_mix(images, 1.0, rng())
    is_foreign = (mixed != images).any(dim=1)  # (B, Y, X)
    rows, columns = is_foreign.any(dim=2), is_foreign.any(dim=1)
    assert torch.equal(is_foreign, rows[:, :, None] & columns[:, None, :])  # a rectangle
    torch.testing.assert_close(mixed, torch.where(is_foreign[:, None], images.roll(1, dims=0), images), atol=0, rtol=0)
    torch.testing.assert_close(kept, 1.0 - is_foreign.float().mean(dim=(1, 2)), atol=1e-6, rtol=0)
    assert kept.min() < 0.4
    assert kept.max() > 0.9


def test_mixing_leaves_the_stated_share_of_pictures_alone() -> None:
    images = pictures(num=400)
    mixed, kept = cut_mix(images, 0.25, rng())
    is_mixed = (mixed != images).flatten(1).any(dim=1)
    assert torch.equal(is_mixed, kept < 1.0)
    assert 50 < is_mixed.sum() <= 120  # a rectangle may be smaller than a pixel
    unmixed, kept = cut_mix(images, 0.0, rng())
    torch.testing.assert_close(unmixed, images, atol=0, rtol=0)
    torch.testing.assert_close(kept, torch.ones(400), atol=0, rtol=0)
