"""Laws that every model of dynamic tokens keeps, of the first version and of the reconstruction of the second."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.semantic_fpn import SemanticFpnConfig
from models.tcformer import TCFormerClassifier, TCFormerKeypoints, TCFormerSegmenter
from models.tcformer_v2 import (
    TCFormerV2ReconstructionClassifier,
    TCFormerV2ReconstructionSegmenter,
)
from tests.models.picture_laws import assert_gradients_reach_every_parameter, filled, pictures
from tests.models.small_tcformers import SMALL, SMALL_NECK, SMALL_V2

HEAD = SemanticFpnConfig(dim=8)
CONV_NECK = replace(SMALL_NECK, reduction="conv", num_outputs=4, extra="conv")
MODELS = {
    "classifier": lambda: TCFormerClassifier(SMALL, num_classes=5),
    "segmenter": lambda: TCFormerSegmenter(SMALL, num_classes=5, neck=SMALL_NECK, head=HEAD),
    "conv neck": lambda: TCFormerSegmenter(SMALL, num_classes=5, neck=CONV_NECK, head=HEAD),
    "keypoints": lambda: TCFormerKeypoints(SMALL, num_keypoints=5, neck=SMALL_NECK),
    "v2 classifier": lambda: TCFormerV2ReconstructionClassifier(SMALL_V2, num_classes=5),
    "v2 segmenter": lambda: TCFormerV2ReconstructionSegmenter(SMALL_V2, num_classes=5, head=HEAD),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return filled(MODELS[request.param]()).eval()


@torch.no_grad()
def test_a_picture_gives_the_same_alone_and_in_a_batch(model: nn.Module) -> None:
    images = pictures(48, 32)
    outputs, regions = model(images)
    for i in range(2):
        alone, regions_alone = model(images[i : i + 1])
        torch.testing.assert_close(alone[0], outputs[i], atol=1e-5, rtol=1e-5)
        for a, b in zip(regions_alone, regions, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 32), (49, 37), (13, 90)])
def test_pictures_of_any_size_are_taken(model: nn.Module, size: tuple[int, int]) -> None:
    outputs, regions = model(pictures(*size))
    cells = -(-size[0] // 4) * -(-size[1] // 4)
    assert [region.shape for region in regions] == [(2, cells)] * 2
    assert outputs.isfinite().all()
    assert outputs[0].ne(outputs[1]).any()
    torch.testing.assert_close(model(pictures(*size))[0], outputs, atol=0, rtol=0)


def test_gradients_reach_every_parameter(model: nn.Module) -> None:
    model.zero_grad()
    model(pictures(48, 32))[0].square().sum().backward()
    # The same added to all scores changes neither means nor attention: their bias gets rounding, or nothing.
    assert_gradients_reach_every_parameter(model, without_effect=("ctm.score.bias",))


def test_matrix_products_in_half_precision_train_every_parameter(model: nn.Module) -> None:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = model(pictures(48, 32))
    outputs.float().square().sum().backward()
    assert outputs.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
