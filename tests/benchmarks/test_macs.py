from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.macs import count_macs, render_macs
from models import BUILDERS
from models.mta import Mta, MtaConfig
from models.paca_seg import PACA_SEG_BASE, PACA_SEG_SMALL, PACA_SEG_TINY, PaCaSegmenter
from models.paca_vit import PaCaViTConfig
from models.tcformer import TCFORMER_BASE, TCFormer, TCFormerClassifier, TCFormerConfig
from models.tcformer_v2 import TCFORMER_V2_RECONSTRUCTION_BASE, TCFormerV2ReconstructionSegmenter


def built(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return BUILDERS[name](num_classes=num_classes)


def gmac(model: nn.Module, side: int) -> float:
    return count_macs(model, rows=side, columns=side).total() / 1e9


def test_a_small_model_is_counted_as_by_hand() -> None:
    config = TCFormerConfig(
        dims=(2, 3),
        num_heads=(1, 1),
        depths=(1, 1),
        mlp_ratios=(2, 2),
        reduction_ratios=(2, 1),
        sample_ratios=(0.25,),
    )
    N, M = 16 * 8, 4 * 8  # cells and the first stage's tokens; tokens of the second
    with torch.device("meta"):
        macs = count_macs(TCFormerClassifier(config, num_classes=5), rows=64, columns=32)
    block1 = N * 2 * 2 + (N // 4) * 2 * 4 + N * 2 * 2 + 2 * N * 2 * 4
    block2 = M * 3 * 3 + N * 3 * 6 + M * 3 * 3 + 2 * M * 3 * 6  # the first block's keys are the tokens before merging
    assert macs["linear"] == block1 + (N * 2 * 3 + N * 3) + block2 + 3 * 5
    stem, reduce, mlp1 = N * 2 * 3 * 49, (N // 4) * 2 * 2 * 4, N * 4 * 9
    assert macs["convolution"] == stem + reduce + mlp1 + M * 3 * 2 * 9 + M * 6 * 9
    assert macs["attention"] == 2 * N * (N // 4) * 2 + 2 * M * N * 3
    assert macs["distances"] == N * N * 3
    assert macs["exchange"] == N * 3 + N * 3 + 2 * N * 6 + M * 6  # map to tokens, merging, MLP both ways, its skip


def test_counting_leaves_no_hook_behind() -> None:
    model = built("tcformer-light", 10)
    first = count_macs(model, rows=64, columns=64)
    assert count_macs(model, rows=64, columns=64) == first
    assert not any(module._forward_hooks for module in model.modules())


# SPEC of TCFormer, sections 3 and 5, by the official counter: 224 px without the head, and 512 px with neck.
@pytest.mark.parametrize(
    ("name", "official"), [("tcformer-light", 3.84), ("tcformer-base", 5.83), ("tcformer-large", 12.15)]
)
def test_classifiers_cost_what_the_official_counter_says(name: str, official: float) -> None:
    assert gmac(built(name, 1000), 224) == pytest.approx(official, rel=0.01)


def test_the_first_version_with_its_neck_costs_what_the_official_counter_says() -> None:
    class WithNeck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.neck = TCFormer(TCFORMER_BASE), Mta(TCFORMER_BASE.dims, MtaConfig(dim=256))

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return self.neck(self.backbone(image))

    with torch.device("meta"):
        assert gmac(WithNeck(), 512) == pytest.approx(84.32, rel=0.01)


def test_the_first_version_costs_as_published_at_512_pixels() -> None:
    assert gmac(built("tcformer-fpn-base", 150), 512) == pytest.approx(92.4, rel=0.01)


def test_the_reconstruction_of_the_second_version_costs_no_more_than_published() -> None:
    assert 44.4 * 0.99 <= gmac(built("tcformer-v2-reconstruction-fpn-base", 150), 512) <= 44.4


COARSE = ((4, 4), (2, 2), (1, 1))


@pytest.mark.parametrize(
    ("change", "cost"),
    [
        ({}, 44.2),
        ({"parts": COARSE}, 47.2),
        ({"neck_mlp_ratios": (2, 2, 2)}, 47.1),
        ({"neck_mlp_ratios": (4, 4, 4)}, 52.9),
        ({"parts": COARSE, "neck_dim": 128, "neck_mlp_ratios": (4, 4, 4)}, 40.2),
    ],
)
def test_other_choices_cost_what_the_reconstruction_says_of_them(change: dict[str, Any], cost: float) -> None:
    config = replace(TCFORMER_V2_RECONSTRUCTION_BASE, **change)
    with torch.device("meta"):
        assert round(gmac(TCFormerV2ReconstructionSegmenter(config, num_classes=150), 512), 1) == cost


# README of PaCa-ViT: GFLOPs of classifiers at 224 px and of segmentation models at 512 px, one per multiply-accumulate.
@pytest.mark.parametrize(
    ("name", "published"),
    [("paca-vit-tiny", 3.2), ("paca-vit-small", 5.5), ("paca-vit-small-blockwise", 6.1), ("paca-vit-base", 9.5)],
)
def test_paca_classifiers_cost_as_published(name: str, published: float) -> None:
    assert gmac(built(name, 1000), 224) == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("config", "published"), [(PACA_SEG_TINY, 34.4), (PACA_SEG_SMALL, 47.2), (PACA_SEG_BASE, 68.5)]
)
def test_paca_segmentation_models_cost_as_published(config: PaCaViTConfig, published: float) -> None:
    with torch.device("meta"):
        model = PaCaSegmenter(config, num_classes=150)
    assert gmac(model, 512) == pytest.approx(published, rel=0.03)


def test_the_table_has_a_row_for_each_model_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.macs.PICTURES", {"classification": (("tcformer-light",), (64, 96))})
    lines = render_macs().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| tcformer-light", "64"], ["| tcformer-light", "96"]]
    assert all(len(line.split("|")) == len(lines[0].split("|")) for line in lines)
