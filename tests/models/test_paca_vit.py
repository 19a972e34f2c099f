import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import paca_blocks
from models.attention import attention_weights
from models.checkpoints import load_official, paca_vit_renames
from models.layers import tokens_to_map
from models.paca_vit import PaCaViTClassifier, PaCaViTConfig
from tests.golden_files import golden_files
from tests.models.golden_pictures import assert_stored_outputs, read_golden, read_metadata, taken

GOLDEN = golden_files("tcformer_and_paca_vit", "paca_conv", "paca_mlp", "paca_eps")

SMALL = PaCaViTConfig(
    dims=(8, 16),
    num_heads=(2, 4),
    depths=(5, 2),
    mlp_ratios=(2, 3),
    num_clusters=(6, 0),
    clustering_kernel_sizes=(3, 3),
    onsite_clustering=(0, 0),
)


def config_from_official(official: Mapping[str, Any]) -> PaCaViTConfig:
    """The official arguments as our config; ValueError names an argument that ours has no place for."""
    arch, paca = official["arch_cfg"], official["paca_cfg"]
    kinds = {"P2CConv2d": "conv", "P2CMlp": "mlp"}
    if paca["type"] not in kinds:
        raise ValueError(f"type={paca['type']} is not among {', '.join(kinds)}")
    for name, built in {
        "cluster_pos_embed": False,
        "mlp_func": "Mlp",
        "with_dwconv_in_mlp": True,
        "with_shortcut_in_mlp": True,
    }.items():
        if paca[name] != built:
            raise ValueError(f"{name}={paca[name]}; only {built} is built")
    for name, value in official.items():
        if name not in {"arch_cfg", "paca_cfg", "img_size", "num_classes"} and value:
            raise ValueError(f"{name}={value} is not built")
    return PaCaViTConfig(
        dims=tuple(arch["embed_dims"]),
        num_heads=tuple(arch["num_heads"]),
        depths=tuple(arch["depths"]),
        mlp_ratios=tuple(arch["mlp_ratios"]),
        num_clusters=tuple(paca["clusters"]),
        clustering=kinds[paca["type"]],
        clustering_kernel_sizes=tuple(paca["clustering_kernel_size"]),
        onsite_clustering=tuple(int(every) for every in paca["onsite_clustering"]),
        norm1_eps=paca["norm_cfg1"]["eps"],
        norm2_eps=paca["norm_cfg2"]["eps"],
        cluster_norm_eps=paca["cluster_norm_cfg"]["eps"],
    )


def record(model: PaCaViTClassifier, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Fill the dictionary with every intermediate of a call, under the names of the golden files."""
    seen: dict[str, Tensor] = {}
    full_attention, weights = paca_blocks.full_attention, []

    def recording_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights.append(attention_weights(q, k))
        return full_attention(q, k, v)

    def keep(module: nn.Module, *names: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            seen.update({name: tensor for name, tensor in zip(names, outputs, strict=True) if tensor is not None})

        module.register_forward_hook(hook)

    monkeypatch.setattr(paca_blocks, "full_attention", recording_attention)
    for s, stage in enumerate(model.backbone.stages, start=1):
        keep(stage.norm, f"norm{s}.x")
        for b, block in enumerate(stage.blocks):
            keep(block, f"stage{s}.{b}.x", f"stage{s}.{b}.z")
            keep(block.attention, f"stage{s}.{b}.attn_out", f"stage{s}.{b}.z")
            block.attention.register_forward_hook(
                lambda *_, name=f"stage{s}.{b}.attn": seen.update({name: weights.pop()})
            )
    model.backbone.stages[0].downsample.register_forward_hook(
        lambda _module, _inputs, output: seen.update(patch_embed=tokens_to_map(*output))
    )
    model.register_forward_hook(lambda _module, _inputs, output: seen.update(logits=output[0]))
    return seen


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_outputs_of_paca_vit_are_reproduced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, stored = read_golden(path)
    official = json.loads(metadata["config"])
    config = config_from_official(official)
    model = PaCaViTClassifier(config, num_classes=official["num_classes"]).eval()
    renames = paca_vit_renames(config.clustering, num_stages=len(config.dims))
    load_official(model, taken(stored, "sd."), renames)
    seen = record(model, monkeypatch)

    assert_stored_outputs(model, seen, stored, metadata, needed="logits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "P2CLinear"}, "P2CLinear"),
        ({"with_dwconv_in_mlp": False}, "with_dwconv_in_mlp"),
        ({"with_shortcut_in_mlp": False}, "with_shortcut_in_mlp"),
        ({"cluster_pos_embed": True}, "cluster_pos_embed"),
    ],
)
@pytest.mark.skipif(not GOLDEN, reason="GOLDEN_ROOT holds no golden file of PaCa-ViT")
def test_official_settings_that_are_not_built_are_refused(change: dict[str, object], message: str) -> None:
    official = json.loads(read_metadata(GOLDEN[0])["config"])
    with pytest.raises(ValueError, match=message):
        config_from_official(official | {"paca_cfg": official["paca_cfg"] | change})


@pytest.mark.parametrize(("every", "makers"), [(0, [0]), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (7, [0])])
def test_onsite_clustering_says_which_blocks_make_an_assignment(every: int, makers: list[int]) -> None:
    blocks = PaCaViTClassifier(replace(SMALL, onsite_clustering=(every, 0)), num_classes=3).backbone.stages[0].blocks
    assert [b for b, block in enumerate(blocks) if block.attention.clustering is not None] == makers


def test_the_model_returns_the_assignment_of_the_last_block_of_each_clustered_stage() -> None:
    torch.manual_seed(0)
    model = PaCaViTClassifier(replace(SMALL, onsite_clustering=(1, 0)), num_classes=3).eval()
    outputs: list[tuple[Tensor, Tensor]] = []
    for block in model.backbone.stages[0].blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    _, clusters = model(torch.randn(1, 3, 16, 16))
    assert len(clusters) == 1
    torch.testing.assert_close(clusters[0], outputs[-1][1], atol=0, rtol=0)


def test_the_hidden_layer_of_the_mlp_clustering_follows_the_mlp_ratio() -> None:
    model = PaCaViTClassifier(replace(SMALL, clustering="mlp", mlp_ratios=(2.5, 3)), num_classes=3)
    assert model.backbone.stages[0].blocks[0].attention.clustering.hidden.weight.shape == (20, 8)


def test_fresh_blocks_pass_tokens_on_unchanged() -> None:
    torch.manual_seed(0)
    block = PaCaViTClassifier(SMALL, num_classes=3).backbone.stages[0].blocks[0]
    x = torch.randn(2, 16, 8)
    torch.testing.assert_close(block(x, (4, 4), None)[0], x, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 1, 1)}, "depths has 3 entries; dims has 2 stages"),
        ({"mlp_ratios": (4.0,)}, "mlp_ratios has 1 entries; dims has 2 stages"),
        ({"num_heads": (3, 4)}, "num_heads=3 must divide model_dim=8"),
        ({"clustering_kernel_sizes": (4, 3)}, "kernel size=4 must be odd"),
        ({"drop_path": 1.0}, "drop path rate=1.0"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaCaViTClassifier(replace(SMALL, **change), num_classes=3)


def test_evidence_adds_up_to_the_logits_and_changes_nothing_else() -> None:
    torch.manual_seed(0)
    model = PaCaViTClassifier(SMALL, num_classes=3).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
        image = torch.randn(2, 3, 32, 24)
        logits, clusters = model(image)
        again, same, evidence = model.explain(image)
    assert torch.equal(again, logits)
    assert all(map(torch.equal, same, clusters))
    assert evidence.shape == (2, 3, 4, 3)
    # A mean of 12 patches, summed in another order in float32.
    torch.testing.assert_close(evidence.sum((2, 3)), logits, atol=1e-5, rtol=1e-5)
    assert evidence.flatten(2).std(dim=2).min() > 1e-3, "patches differ"
