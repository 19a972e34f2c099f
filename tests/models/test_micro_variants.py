"""Laws of our own small variants; those of PaCa-ViT micro are in `test_builders.py`."""

import pytest
import torch
from torch import nn

from models import BUILDERS
from tests.models.picture_laws import assert_gradients_reach_every_parameter, filled, pictures

L = 3
SEGMENTERS = ("paca-fpn-micro", "tcformer-fpn-micro", "tcformer-v2-reconstruction-fpn-micro")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return filled(BUILDERS[name](num_classes=L))


@torch.no_grad()
@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("size", [(90, 120), (75, 101)])
def test_logits_have_a_quarter_of_the_rows_and_columns_and_do_not_depend_on_the_batch(
    name: str, size: tuple[int, int]
) -> None:
    model = build(name).eval()
    logits, _ = model(pictures(*size))
    assert logits.shape == (2, L, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(model(pictures(*size)[1:])[0], logits[1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_the_stride_of_the_stem_gives_small_pictures_four_times_the_tokens() -> None:
    logits, (first, second) = build("tcformer-micro").eval()(pictures(32, 32))
    assert logits.shape == (2, L)
    assert first.shape == second.shape == (2, 256)
    for sample, regions, count in ((0, first, 64), (1, first, 64), (0, second, 16)):
        assert regions[sample].unique().tolist() == list(range(count))


@pytest.mark.parametrize(("name", "size"), [*((name, (64, 96)) for name in SEGMENTERS), ("tcformer-micro", (24, 24))])
def test_gradients_reach_every_parameter_in_half_precision(name: str, size: tuple[int, int]) -> None:
    model = build(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pictures(*size))[0].float().square().mean().backward()
    without_effect = (".attention.k.bias", ".attention.clustering.out.bias")  # as in `test_builders.py`
    assert_gradients_reach_every_parameter(model, without_effect=without_effect)


@pytest.mark.parametrize(
    ("name", "most"),
    # A bundle holds the weights twice, in half precision: 10 MB with a segmenter, 6 MB with TCFormer's classifier.
    [
        ("tcformer-fpn-micro", 2.2e6),
        ("tcformer-v2-reconstruction-fpn-micro", 2.2e6),
        ("tcformer-micro", 1.4e6),
    ],
)
def test_a_bundle_stays_small(name: str, most: float) -> None:
    with torch.device("meta"):
        model = BUILDERS[name](num_classes=11)
    assert sum(parameter.numel() for parameter in model.parameters()) < most
