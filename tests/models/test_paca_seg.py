import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.checkpoints import load_official
from models.checkpoints_tcformer import paca_seg_renames
from models.layers import tokens_to_map
from models.paca_seg import (
    PACA_SEG_BASE,
    PACA_SEG_SMALL,
    PACA_SEG_TINY,
    ClusterProjection,
    PaCaFpnSegmenter,
    PaCaSegHead,
    PaCaSegmenter,
)
from models.paca_vit import PaCaViTConfig
from models.semantic_fpn import SemanticFpnConfig
from tests.golden_files import golden_files
from tests.models.golden_pictures import assert_stored_outputs, read_golden, taken
from tests.models.picture_laws import assert_gradients_reach_every_parameter, filled, pictures
from tests.models.test_paca_vit import SMALL, config_from_official, record

GOLDEN = golden_files("tcformer_and_paca_vit", "paca_seg")
HEAD_ARGUMENTS = {"in_channels", "in_index", "channels", "num_classes"}


def head_from_official(head: dict[str, Any], config: PaCaViTConfig) -> dict[str, int]:
    """The official head's arguments as ours; ValueError names one that ours has no place for."""
    if unknown := head.keys() - HEAD_ARGUMENTS:
        raise ValueError(f"{', '.join(unknown)} is not built")
    stages = list(range(len(config.dims)))
    if tuple(head["in_channels"]) != config.dims or head["in_index"] != stages:
        raise ValueError(f"in_index={head['in_index']}; only all stages, {stages}, are built")
    return {"num_classes": head["num_classes"], "head_dim": head["channels"]}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_outputs_of_paca_segmentation_are_reproduced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, stored = read_golden(path)
    official = json.loads(metadata["config"])
    config = config_from_official({name: value for name, value in official.items() if name != "out_indices"})
    model = PaCaSegmenter(config, **head_from_official(json.loads(metadata["seg_head"]), config)).eval()
    weights = {f"decode_head.{name}": tensor for name, tensor in taken(stored, "head.sd.").items()}
    weights |= {f"backbone.{name}": tensor for name, tensor in taken(stored, "sd.").items()}
    load_official(model, weights, paca_seg_renames(config.clustering, num_stages=len(config.dims)))
    seen = record(model, monkeypatch)
    for s, stage in enumerate(model.backbone.stages):
        stage.register_forward_hook(
            lambda _module, _inputs, output, name=f"feat{s}": seen.update(
                {name: tokens_to_map(output.tokens, output.grid)}
            )
        )

    def run(picture: Tensor) -> None:
        seen["seg_logits"], _, seen["seg_clusters_raw"] = model(picture)

    assert_stored_outputs(run, seen, stored, metadata, needed="seg_logits")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"in_channels": [8, 16], "in_index": [0, 1], "channels": 4, "num_classes": 3, "aux": 1}, "aux is not built"),
        ({"in_channels": [8], "in_index": [0], "channels": 4, "num_classes": 3}, "in_index"),
    ],
)
def test_official_heads_that_are_not_built_are_refused(head: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_from_official(head, SMALL)


@pytest.fixture(params=["paca head", "fpn head"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    config = replace(SMALL, depths=(2, 1))
    if request.param == "paca head":
        return filled(PaCaSegmenter(config, num_classes=5, head_dim=12)).eval()
    return filled(PaCaFpnSegmenter(config, num_classes=5, head=SemanticFpnConfig(pyramid_dim=12, dim=8))).eval()


@torch.no_grad()
def test_a_picture_gives_the_same_alone_and_in_a_batch(model: nn.Module) -> None:
    together = model(pictures(32, 32))
    for i in range(2):
        alone = model(pictures(32, 32)[i : i + 1])
        torch.testing.assert_close(alone[0][0], together[0][i], atol=1e-6, rtol=1e-5)
        for a, b in zip(alone[1], together[1], strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-7, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("size", "quarter"), [((32, 32), (8, 8)), ((49, 37), (13, 10))])
def test_logits_have_a_quarter_of_the_pictures_size(
    model: nn.Module, size: tuple[int, int], quarter: tuple[int, int]
) -> None:
    logits = model(pictures(*size))[0]
    assert logits.shape == (2, 5, *quarter)
    assert logits.isfinite().all()
    assert logits[0].ne(logits[1]).any()
    torch.testing.assert_close(logits, model(pictures(*size))[0], atol=0, rtol=0)


def test_gradients_reach_every_parameter(model: nn.Module) -> None:
    logits, _, *scores = model(pictures(32, 32))
    (logits.square().sum() + sum(score.square().sum() for score in scores)).backward()
    assert_gradients_reach_every_parameter(model, without_effect=("attention.k.bias",))


def test_the_clusters_of_the_head_are_as_many_as_classes() -> None:
    head = PaCaSegHead((8, 16), num_classes=7, dim=4).eval()
    logits, scores = head([torch.randn(1, 8, 6, 4), torch.randn(1, 16, 3, 2)])
    assert logits.shape == scores.shape == (1, 7, 6, 4)


def test_clusters_are_normalised_over_batch_and_clusters() -> None:
    torch.manual_seed(0)
    projection = ClusterProjection(4, 6).train()
    with torch.no_grad():
        projection.norm.bias.fill_(10)  # nothing is cut off
    out = projection(torch.randn(3, 5, 4)) - 10
    torch.testing.assert_close(out.mean(dim=(0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.square().mean(dim=(0, 1)), torch.ones(6), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("config", "millions"), [(PACA_SEG_TINY, 13.33), (PACA_SEG_SMALL, 23.16), (PACA_SEG_BASE, 47.96)]
)
def test_published_variants_have_the_measured_number_of_parameters(config: PaCaViTConfig, millions: float) -> None:
    with torch.device("meta"):
        model = PaCaSegmenter(config, num_classes=150)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions
