import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.semantic_fpn import FeaturePyramid, SemanticFpnConfig, SemanticFpnHead

SIZES = [(12, 10), (6, 5), (3, 3), (2, 2)]


def maps(dims: tuple[int, ...] = (3, 4, 5, 6), batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, dim, *size, generator=generator) for dim, size in zip(dims, SIZES, strict=False)]


def test_a_level_is_convolved_once_per_doubling_and_the_finest_once() -> None:
    head = SemanticFpnHead((3, 4, 5, 6), SemanticFpnConfig(dim=7), num_classes=2)
    widths = [[(conv.conv.in_channels, conv.conv.out_channels) for conv in level.convs] for level in head.levels]
    assert widths == [[(3, 7)], [(4, 7)], [(5, 7), (7, 7)], [(6, 7), (7, 7), (7, 7)]]


def test_the_head_adds_all_levels_at_the_size_of_the_finest() -> None:
    torch.manual_seed(0)
    head, inputs = SemanticFpnHead((3, 4, 5), SemanticFpnConfig(dim=7), num_classes=2).eval(), maps((3, 4, 5))
    (first,), (second,), (third, fourth) = (level.convs for level in head.levels)

    def rise(fmap: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(fmap, size=size, mode="bilinear", align_corners=False)

    coarsest = rise(fourth(rise(third(inputs[2]), SIZES[1])), SIZES[0])
    expected = head.classifier(first(inputs[0]) + rise(second(inputs[1]), SIZES[0]) + coarsest)
    torch.testing.assert_close(head(inputs), expected, atol=1e-6, rtol=1e-5)


def test_a_picture_gives_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    head, inputs = SemanticFpnHead((3, 4, 5, 6), SemanticFpnConfig(dim=7), num_classes=2).eval(), maps()
    together = head(inputs)
    for i in range(2):
        alone = head([fmap[i : i + 1] for fmap in inputs])
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    head = SemanticFpnHead((8, 8, 8, 8), SemanticFpnConfig(dim=7), num_classes=2).eval()
    pyramid = FeaturePyramid((3, 4, 5, 6), 8)
    head(pyramid(maps())).square().sum().backward()
    for name, parameter in [*head.named_parameters(), *pyramid.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_while_training_whole_channels_are_dropped() -> None:
    torch.manual_seed(0)
    head = SemanticFpnHead((3,), SemanticFpnConfig(dim=200, dropout=0.5), num_classes=2)
    seen: list[Tensor] = []
    head.classifier.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    head(maps((3,)))
    is_dropped = (seen[0] == 0).flatten(2).all(dim=2)
    assert 0.4 < is_dropped.float().mean() < 0.6


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_the_pyramid_hands_coarse_maps_down_and_none_up(level: int) -> None:
    torch.manual_seed(0)
    pyramid, inputs = FeaturePyramid((3, 4, 5, 6), 8), maps()
    before = pyramid(inputs)
    inputs[level] = inputs[level] + 1
    changed = [(a - b).abs().max().item() > 1e-3 for a, b in zip(before, pyramid(inputs), strict=True)]
    assert changed == [i <= level for i in range(4)]
    assert [fmap.shape for fmap in before] == [(2, 8, *size) for size in SIZES]
