from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from models import token_exchange
from models.semantic_fpn import SemanticFpnConfig
from models.tcformer import (
    TCFORMER_BASE,
    TCFORMER_LARGE,
    TCFORMER_LIGHT,
    TCFormer,
    TCFormerClassifier,
    TCFormerConfig,
    TCFormerKeypoints,
    TCFormerSegmenter,
)
from models.token_blocks import Source
from models.token_exchange import link_tokens
from tests.models.picture_laws import filled, pictures
from tests.models.small_tcformers import SMALL, SMALL_NECK
from tests.models.test_density_peaks import LargestAllocation


def test_a_picture_too_small_for_one_key_is_refused() -> None:
    assert TCFORMER_BASE.smallest_side == 29
    model = TCFormerClassifier(SMALL, num_classes=5).eval()
    with torch.no_grad():
        model(pictures(SMALL.smallest_side, SMALL.smallest_side))
    with pytest.raises(ValueError, match="picture has 40x12 pixels; this model needs 13 each way"):
        model(pictures(40, 12))


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 32), (49, 37), (13, 90)])
def test_every_merge_keeps_its_share_of_the_tokens(size: tuple[int, int]) -> None:
    _, regions = TCFormerClassifier(SMALL, num_classes=5).eval()(pictures(*size))
    cells = -(-size[0] // 4) * -(-size[1] // 4)
    counts = [-(-cells // 4)]
    counts.append(-(-counts[0] // 2))
    assert [[len(set(row)) for row in region.tolist()] for region in regions] == [[count] * 2 for count in counts]


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        lambda: TCFormerClassifier(SMALL, num_classes=5),
        lambda: TCFormerSegmenter(SMALL, num_classes=5, neck=SMALL_NECK, head=SemanticFpnConfig(dim=8)),
    ],
    ids=["classifier", "segmenter"],
)
def test_gathering_equals_the_dense_exchange(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = filled(build()).eval()
    dense, _ = model(pictures(49, 37))
    monkeypatch.setattr(token_exchange, "LINKS_PER_CELL", 0)
    torch.testing.assert_close(model(pictures(49, 37))[0], dense, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pixels", [512, 1024])
def test_no_step_makes_a_matrix_of_all_pairs_of_cells(pixels: int) -> None:
    """All pairs would be 1.07 GB at 512 pixels and 17 GB at 1024; most is the attention of 4 heads to N / 64 keys."""
    with torch.device("meta"), torch.no_grad(), LargestAllocation() as largest:
        TCFormerSegmenter(TCFORMER_LIGHT, num_classes=11)(torch.empty(1, 3, pixels, pixels))
    assert largest.num_bytes <= 4 * (pixels // 4) ** 4 // 16  # 67 MB and 1.07 GB


def test_only_the_first_block_of_a_stage_sees_the_tokens_before_merging() -> None:
    backbone = TCFormer(SMALL).eval()
    sources: list[Source | None] = []
    for block in backbone.stages[1].blocks:
        block.register_forward_hook(lambda _module, inputs, _output: sources.append(inputs[2]))
    levels = backbone(pictures(48, 32))
    assert sources[0] is not None
    assert sources[0].x.shape[1] == levels[0].x.shape[1]
    assert sources[1:] == [None]


def test_fresh_blocks_pass_tokens_on_unchanged() -> None:
    x, links = torch.randn(2, 16, 8), link_tokens(None, num_tokens=16, cell_grid=(4, 4), grid=(4, 4))
    torch.testing.assert_close(TCFormer(SMALL).stages[0].blocks[0](x, links), x, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 1)}, "depths has 2 entries; dims with 3 needs 3"),
        ({"sample_ratios": (0.5, 0.5, 0.5)}, "sample_ratios has 3 entries; dims with 3 needs 2"),
        ({"sample_ratios": (0.5, 1.5)}, "sample ratio=1.5 must lie in"),
        ({"num_heads": (3, 2, 2)}, "num_heads=3 must divide model_dim=8"),
        ({"drop_path": 1.0}, "drop path rate=1.0"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TCFormer(replace(SMALL, **change))


@pytest.mark.parametrize(
    ("config", "millions", "keypoint_millions"),
    [(TCFORMER_LIGHT, 14.23, None), (TCFORMER_BASE, 25.59, 27.78), (TCFORMER_LARGE, 62.82, 65.01)],
    ids=["light", "base", "large"],
)
def test_published_variants_have_the_measured_number_of_parameters(
    config: TCFormerConfig, millions: float, keypoint_millions: float | None
) -> None:
    def count(model: nn.Module) -> float:
        return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)

    with torch.device("meta"):
        assert count(TCFormerClassifier(config, num_classes=1000)) == millions
        if keypoint_millions is not None:
            assert count(TCFormerKeypoints(config, num_keypoints=133)) == keypoint_millions
