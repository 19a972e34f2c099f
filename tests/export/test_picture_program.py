from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from export.picture_program import PictureProgram
from service.bundle import Normalisation
from tests.export.conftest import MEAN, SIDE, STD, make_model

NORMALISATION = Normalisation(mean=MEAN, std=STD)


def make_images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


def normalise(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return ((images.permute(0, 3, 1, 2).double() / 255 - mean) / std).float()


def first_convolution(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


@torch.inference_mode()
def test_raw_pixels_give_what_normalised_ones_gave() -> None:
    model, images = make_model(), make_images()
    logits, clusters = model(normalise(images))
    found_logits, *found_clusters = make_program(model)(images)
    # float32 against float32 in another order, through four blocks
    assert_close(found_logits, logits, atol=1e-5 * logits.abs().max().item(), rtol=0)
    for found, expected in zip(found_clusters, clusters, strict=True):
        assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@torch.inference_mode()
def test_pixels_at_the_border_are_normalised_as_well() -> None:
    model, images = make_model(), make_images()
    expected = first_convolution(model)(normalise(images))
    program = make_program(model)
    found = first_convolution(program)(images.permute(0, 3, 1, 2).float() - program.mean)
    assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)  # sums of 27 products in float32
    border, interior = differences_where_the_mean_is_folded(model, images, expected)
    assert interior < 1e-5 * expected.abs().max().item(), "folding the mean as well is exact inside"
    assert border > 0.1 * expected.abs().max().item(), "and wrong where zeros are padded, which this test would see"


def differences_where_the_mean_is_folded(model: nn.Module, images: Tensor, expected: Tensor) -> tuple[float, float]:
    naive = deepcopy(first_convolution(make_program(model)))
    assert naive.bias is not None
    shift = (naive.weight * make_program(model).mean).sum((1, 2, 3))
    naive.bias = nn.Parameter(naive.bias - shift, requires_grad=False)
    difference = (naive(images.permute(0, 3, 1, 2).float()) - expected).abs()
    return difference[..., 0, :].max().item(), difference[..., 1:-1, 1:-1].max().item()


def make_program(model: nn.Module) -> PictureProgram:
    return PictureProgram(deepcopy(model), NORMALISATION).eval()
