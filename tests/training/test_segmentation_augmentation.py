import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from training.segmentation_augmentation import cut_masks, cut_pictures, draw_boxes

SIZE = (12, 16)
VOID = 5


def rng() -> Generator:
    return Generator().manual_seed(0)


def pictures(num: int = 1) -> Tensor:
    return torch.rand(num, 3, *SIZE, generator=rng())


def masks(num: int = 1) -> Tensor:
    return torch.randint(VOID, (num, *SIZE), generator=rng(), dtype=torch.uint8)


def test_the_whole_picture_is_given_back_as_it_is() -> None:
    whole = torch.tensor([[0.0, 0.0, *map(float, SIZE)]])
    torch.testing.assert_close(cut_pictures(pictures(), whole, SIZE), pictures(), atol=1e-6, rtol=0)
    assert cut_masks(masks(), whole, SIZE, void=VOID).equal(masks().long())


def test_a_box_of_whole_pixels_is_a_slice_of_picture_and_mask() -> None:
    box = torch.tensor([[2.0, 3.0, 8.0, 10.0]])
    torch.testing.assert_close(cut_pictures(pictures(), box, (8, 10)), pictures()[..., 2:10, 3:13], atol=1e-5, rtol=0)
    assert cut_masks(masks(), box, (8, 10), void=VOID).equal(masks()[:, 2:10, 3:13].long())


def test_a_box_of_negative_width_is_mirrored() -> None:
    box = torch.tensor([[0.0, 16.0, 12.0, -16.0]])
    torch.testing.assert_close(cut_pictures(pictures(), box, SIZE), pictures().flip(-1), atol=1e-5, rtol=0)
    assert cut_masks(masks(), box, SIZE, void=VOID).equal(masks().flip(-1).long())


def test_what_lies_outside_is_zero_in_the_picture_and_void_in_the_mask() -> None:
    box = torch.tensor([[-6.0, 0.0, 24.0, 32.0]])
    size = (24, 32)
    picture, mask = cut_pictures(pictures(), box, size), cut_masks(masks(), box, size, void=VOID)
    torch.testing.assert_close(picture, F.pad(pictures(), (0, 16, 6, 6)), atol=1e-5, rtol=0)
    assert mask.equal(F.pad(masks().long(), (0, 16, 6, 6), value=VOID))


def test_every_picture_gets_its_own_box() -> None:
    boxes = torch.tensor([[0.0, 0.0, 6.0, 8.0], [6.0, 8.0, 6.0, 8.0]])
    cropped = cut_masks(masks(2), boxes, (6, 8), void=VOID)
    assert cropped[0].equal(masks(2)[0, :6, :8].long())
    assert cropped[1].equal(masks(2)[1, 6:, 8:].long())


@pytest.mark.parametrize("crop", [(6, 8), (12, 16)])
def test_boxes_keep_their_shape_and_lie_inside_the_picture_or_contain_it(crop: tuple[int, int]) -> None:
    boxes = draw_boxes(SIZE, crop, (0.5, 2.0), num=400, rng=rng())
    top, left, height, width = boxes.T
    left, width = torch.where(width < 0, left + width, left), width.abs()
    torch.testing.assert_close(height / width, torch.full((400,), crop[0] / crop[1]))
    scale = crop[0] / height
    assert scale.min() > 0.499
    assert scale.max() < 2.001
    assert (scale < 0.6).any()
    assert (scale > 1.7).any()
    for start, length, side in ((top, height, SIZE[0]), (left, width, SIZE[1])):
        is_small = length <= side
        inside, around = (
            (start >= -1e-3) & (start + length <= side + 1e-3),
            (start <= 1e-3) & (start + length >= side - 1e-3),
        )
        assert torch.where(is_small, inside, around).all()
    assert 0.4 < (boxes[:, 3] < 0).float().mean() < 0.6
    assert draw_boxes(SIZE, crop, (0.5, 2.0), num=400, rng=rng()).equal(boxes)
