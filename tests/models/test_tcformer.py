from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import token_exchange
from models.layers import map_to_tokens, tokens_to_map
from models.semantic_fpn import SemanticFpnConfig
from models.tcformer import (
    TCFORMER_BASE,
    TCFORMER_LARGE,
    TCFORMER_LIGHT,
    Mta,
    MtaConfig,
    TCFormer,
    TCFormerClassifier,
    TCFormerConfig,
    TCFormerKeypoints,
    TCFormerSegmenter,
)
from models.token_blocks import Source, TokenAttention, biased_attention
from models.token_exchange import link_tokens
from tests.models.test_density_peaks import LargestAllocation
from tests.oracles import paca_attention as oracle

SMALL = TCFormerConfig(
    dims=(8, 12, 16),
    num_heads=(1, 2, 2),
    depths=(1, 2, 1),
    mlp_ratios=(2, 2, 2),
    reduction_ratios=(4, 2, 1),
    sample_ratios=(0.25, 0.5),
)
SMALL_NECK = MtaConfig(dim=8, num_heads=(2, 2), mlp_ratios=(2, 2), reduction_ratios=(4, 2), num_outputs=3)


def small_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = {
        "classifier": lambda: TCFormerClassifier(SMALL, num_classes=5),
        "segmenter": lambda: TCFormerSegmenter(SMALL, num_classes=5, neck=SMALL_NECK, head=SemanticFpnConfig(dim=8)),
        "conv neck": lambda: TCFormerSegmenter(
            SMALL,
            num_classes=5,
            neck=replace(SMALL_NECK, reduction="conv", num_outputs=4, extra="conv"),
            head=SemanticFpnConfig(dim=8),
        ),
        "keypoints": lambda: TCFormerKeypoints(SMALL, num_keypoints=5, neck=SMALL_NECK),
    }[kind]()
    for parameter in built.parameters():
        if not parameter.any():  # fresh biases and the ends of residual branches
            nn.init.normal_(parameter, std=0.05)
    return built.eval()


@pytest.fixture(scope="module", params=["classifier", "segmenter", "conv neck", "keypoints"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return small_model(request.param)


def pictures(rows: int = 48, columns: int = 32) -> Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_picture_gives_the_same_alone_and_in_a_batch(model: nn.Module) -> None:
    outputs, regions = model(pictures())
    for i in range(2):
        alone, regions_alone = model(pictures()[i : i + 1])
        torch.testing.assert_close(alone[0], outputs[i], atol=1e-5, rtol=1e-5)
        for a, b in zip(regions_alone, regions, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 32), (49, 37), (13, 90)])
def test_pictures_of_any_size_are_taken(model: nn.Module, size: tuple[int, int]) -> None:
    outputs, regions = model(pictures(*size))
    cells = -(-size[0] // 4) * -(-size[1] // 4)
    counts = [-(-cells // 4)]
    counts.append(-(-counts[0] // 2))
    assert [region.shape for region in regions] == [(2, cells)] * 2
    assert [[len(set(row)) for row in region.tolist()] for region in regions] == [[count] * 2 for count in counts]
    assert outputs.isfinite().all()
    assert outputs[0].ne(outputs[1]).any()
    torch.testing.assert_close(model(pictures(*size))[0], outputs, atol=0, rtol=0)


def test_gradients_reach_every_parameter(model: nn.Module) -> None:
    model.zero_grad()
    model(pictures())[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_matrix_products_in_half_precision_train_every_parameter(model: nn.Module) -> None:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = model(pictures())
    outputs.float().square().sum().backward()
    assert outputs.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_picture_too_small_for_one_key_is_refused() -> None:
    assert TCFORMER_BASE.smallest_side == 29
    model = small_model("classifier")
    with torch.no_grad():
        model(pictures(SMALL.smallest_side, SMALL.smallest_side))
    with pytest.raises(ValueError, match="picture has 40x12 pixels; this model needs 13 each way"):
        model(pictures(40, 12))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_gathering_equals_the_dense_exchange(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(kind)
    dense, _ = model(pictures(49, 37))
    monkeypatch.setattr(token_exchange, "LINKS_PER_CELL", 0)
    torch.testing.assert_close(model(pictures(49, 37))[0], dense, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("pixels", [512, 1024])
def test_no_step_makes_a_matrix_of_all_pairs_of_cells(pixels: int) -> None:
    """All pairs would be 1.07 GB at 512 pixels and 17 GB at 1024; most is the attention of 4 heads to N / 64 keys."""
    with torch.device("meta"), torch.no_grad(), LargestAllocation() as largest:
        TCFormerSegmenter(TCFORMER_LIGHT, num_classes=11)(torch.empty(1, 3, pixels, pixels))
    assert largest.num_bytes <= 4 * (pixels // 4) ** 4 // 16  # 67 MB and 1.07 GB


def test_on_a_grid_an_attention_with_ratio_1_is_plain_attention() -> None:
    torch.manual_seed(0)
    attention = TokenAttention(8, 2, ratio=1, reduction="conv").double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    parameters = {name: parameter.detach().numpy() for name, parameter in attention.named_parameters()}
    for kind in ("weight", "bias"):
        parameters[f"k.{kind}"], parameters[f"v.{kind}"] = parameters.pop(f"kv.{kind}").reshape(2, 8, -1).squeeze()
    expected = oracle.patch_to_cluster_attention(x.numpy(), None, parameters, num_heads=2, eps=0.0)
    links = link_tokens(None, num_tokens=12, cell_grid=(3, 4), grid=(3, 4))
    torch.testing.assert_close(attention(x, x, links, None), torch.from_numpy(expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["conv", "pool"])
def test_a_reduced_map_is_what_the_keys_are_made_of(reduction: Any) -> None:
    torch.manual_seed(0)
    attention = TokenAttention(8, 2, ratio=2, reduction=reduction)
    whole = TokenAttention(8, 2, ratio=1, reduction=reduction)
    whole.load_state_dict({n: w for n, w in attention.state_dict().items() if not n.startswith(("reduce", "norm"))})
    x, links = torch.randn(2, 24, 8), link_tokens(None, num_tokens=24, cell_grid=(4, 6), grid=(4, 6))
    blocks = tokens_to_map(x, (4, 6)).unflatten(3, (3, 2)).unflatten(2, (2, 2))  # (B, E, Y, 2, X, 2)
    if reduction == "pool":
        keys = map_to_tokens(blocks.mean(dim=(3, 5)))
    else:
        fmap = torch.einsum("beyixj,feij->bfyx", blocks, attention.reduce.weight)
        keys = attention.norm(map_to_tokens(fmap) + attention.reduce.bias)
    torch.testing.assert_close(attention(x, x, links, None), whole(x, keys, links, None), atol=1e-6, rtol=1e-5)


def test_a_score_multiplies_the_weight_of_its_key() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    bias = torch.randn(2, 6, 1)
    factors = bias.exp().mT[:, None] * (q @ k.mT / 2).exp()
    expected = factors @ v / factors.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(biased_attention(q, k, v, bias), expected, atol=1e-5, rtol=1e-5)


def test_only_the_first_block_of_a_stage_sees_the_tokens_before_merging() -> None:
    backbone = TCFormer(SMALL).eval()
    sources: list[Source | None] = []
    for block in backbone.stages[1].blocks:
        block.register_forward_hook(lambda _module, inputs, _output: sources.append(inputs[2]))
    levels = backbone(pictures())
    assert sources[0] is not None
    assert sources[0].x.shape[1] == levels[0].x.shape[1]
    assert sources[1:] == [None]


def test_fresh_blocks_pass_tokens_on_unchanged() -> None:
    x, links = torch.randn(2, 16, 8), link_tokens(None, num_tokens=16, cell_grid=(4, 4), grid=(4, 4))
    torch.testing.assert_close(TCFormer(SMALL).stages[0].blocks[0](x, links), x, atol=0, rtol=0)


def test_further_maps_of_the_neck_leave_rows_and_columns_out() -> None:
    neck = Mta(SMALL.dims, replace(SMALL_NECK, num_outputs=5)).eval()
    maps = neck(TCFormer(SMALL).eval()(pictures(64, 64)))
    assert [fmap.shape[2:] for fmap in maps] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    torch.testing.assert_close(maps[3], maps[2][:, :, ::2, ::2], atol=0, rtol=0)


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
