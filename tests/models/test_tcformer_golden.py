import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import density_peaks, token_blocks, token_exchange
from models.checkpoints_tcformer import load_tcformer
from models.density_peaks import DensityPeaks, dpc_knn
from models.mta import Mta, MtaConfig
from models.tcformer import TCFormerClassifier, TCFormerConfig
from models.token_blocks import Tokens
from models.token_exchange import grid_index, link_tokens, map2token, token2map
from models.token_merging import merge_tokens, token_downup
from tests.golden_files import golden_files
from tests.models.golden_pictures import assert_reproduced, assert_stored_outputs, read_golden, read_metadata, taken

SYSTEM = "tcformer_and_paca_vit"
MODELS = golden_files(SYSTEM, "tcformer_")
BACKBONE_ARGUMENTS = {"embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios", "sample_ratios", "k"}
MTA_ARGUMENTS = {
    "in_channels",
    "out_channels",
    "num_outs",
    "num_heads",
    "mlp_ratios",
    "sr_ratios",
    "use_sr_layer",
    "add_extra_convs",
}


def cases(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Settings and tensors of each case of a file, which must be named in its metadata."""
    metadata, stored = read_golden(path)
    for name in sorted(metadata):
        tensors = taken(stored, f"{name}.")
        if tensors:
            yield json.loads(metadata[name]), tensors
    assert stored == {}, "stored but not compared"


def with_farthest_pair_of_the_batch(scores: Tensor, density: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Scores as official, where the densest token of a sample with padding looks at the pairs of the whole batch."""
    if mask is None:
        return scores
    farthest = torch.cdist(x, x).max() / x.shape[2] ** 0.5 + 1
    densest = density.argmax(dim=1, keepdim=True)
    official = density.gather(1, densest) * farthest
    kept = scores.gather(1, densest)
    return scores.scatter(1, densest, torch.where(mask.bool().all(dim=1, keepdim=True), kept, official))


@pytest.mark.parametrize("path", golden_files(SYSTEM, "dpc_knn"), ids=lambda path: path.stem)
@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
def test_golden_clusters_of_tcformer_are_reproduced(
    path: Path, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_split:
        monkeypatch.setattr(density_peaks, "MAX_PAIRS", 1000)
    for setting, expected in cases(path):
        x, noise, mask = expected.pop("x"), expected.pop("noise"), expected.pop("token_mask", None)
        is_real = None if mask is None else mask > 0
        peaks = dpc_knn(
            x,
            num_clusters=setting["cluster_num"],
            num_neighbors=setting["k"],
            is_neighbor=is_real,
            is_real=is_real,
            noise=noise,
        )
        # Self-distances are rounding noise, in the official matrix product up to 1e-3. Squares are what density uses.
        expected["squares"] = expected.pop("dist_nearest").square()
        found = {
            "squares": peaks.nearest.square(),
            "density": peaks.density,
            "score": with_farthest_pair_of_the_batch(peaks.scores, peaks.density, x, mask),
            "index_down": peaks.centers,
            "idx_cluster": peaks.clusters,
        }
        assert_reproduced(found, expected)


@pytest.mark.parametrize("path", golden_files(SYSTEM, "token_ops"), ids=lambda path: path.stem)
@pytest.mark.parametrize("links_per_cell", [0, 1 << 20], ids=["gathered", "dense"])
def test_golden_exchange_of_tcformer_is_reproduced(
    path: Path, links_per_cell: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_exchange, "LINKS_PER_CELL", links_per_cell)
    for setting, expected in cases(path):
        x, idx_token, agg_weight = expected.pop("x"), expected.pop("idx_token"), expected.pop("agg_weight")
        cell_grid, grid = tuple(setting["init_grid"]), tuple(setting["map_size"])
        num_tokens, num_clusters = setting["tokens"], setting["clusters"]
        links = link_tokens(idx_token, num_tokens=num_tokens, cell_grid=cell_grid, grid=grid)
        weights, clusters = expected.pop("token_weight").squeeze(-1), expected.pop("idx_cluster")
        cell_weights = agg_weight.squeeze(-1)
        merged, token_of_cell, merged_weights = merge_tokens(
            x, weights, clusters, idx_token, cell_weights, num_clusters=num_clusters
        )
        found = {
            "grid_index": grid_index(cell_grid, grid),
            "token2map": token2map(x, links),
            "map2token": map2token(expected.pop("fmap"), links),
            "merged.x": merged,
            "merged.idx_token": token_of_cell,
            "merged.agg_weight": merged_weights[..., None],
            "downup_to_fine": token_downup(merged, token_of_cell, idx_token, cell_weights, num_targets=num_tokens),
            "downup_to_coarse": token_downup(x, idx_token, token_of_cell, merged_weights, num_targets=num_clusters),
        }
        assert_reproduced(found, expected)


def config_from_official(official: Mapping[str, Any]) -> TCFormerConfig:
    """The official arguments as our config; ValueError names an argument that ours has no place for."""
    if unknown := official.keys() - BACKBONE_ARGUMENTS:
        raise ValueError(f"{', '.join(unknown)} is not built")
    return TCFormerConfig(
        dims=tuple(official["embed_dims"]),
        num_heads=tuple(official["num_heads"]),
        depths=tuple(official["depths"]),
        mlp_ratios=tuple(official["mlp_ratios"]),
        reduction_ratios=tuple(official.get("sr_ratios", (8, 4, 2, 1))),
        sample_ratios=tuple(official.get("sample_ratios", (0.25, 0.25, 0.25))),
        num_neighbors=official.get("k", 5),
    )


def neck_from_official(official: Mapping[str, Any]) -> MtaConfig:
    """The same for the neck."""
    if unknown := official.keys() - MTA_ARGUMENTS:
        raise ValueError(f"{', '.join(unknown)} is not built")
    extra = official.get("add_extra_convs", False)
    if extra not in {False, True, "on_input"}:  # True means on_input officially
        raise ValueError(f"add_extra_convs={extra} is not built")
    merges = len(official["in_channels"]) - 1
    return MtaConfig(
        dim=official["out_channels"],
        num_heads=tuple(official.get("num_heads", (2, 2, 2, 2))[:merges]),
        mlp_ratios=tuple(official.get("mlp_ratios", (4, 4, 4, 4))[:merges]),
        reduction_ratios=tuple(official.get("sr_ratios", (8, 4, 2, 1))[:merges]),
        reduction="conv" if official.get("use_sr_layer", True) else "pool",
        num_outputs=official["num_outs"],
        extra="conv" if extra else "pool",
    )


def record(model: TCFormerClassifier, necks: list[Mta], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Fill the dictionary with every intermediate of a call, and what the necks make of it, under the golden names."""
    seen: dict[str, Tensor] = {}
    merges = 0

    def recording_dpc_knn(x: Tensor, **settings: Any) -> DensityPeaks:
        nonlocal merges
        merges += 1
        peaks = dpc_knn(x, **settings)
        named = {"index_down": peaks.centers, "dpc_score": peaks.scores, "idx_cluster": peaks.clusters, "tokens": x}
        seen.update({f"ctm{merges}.{name}": tensor for name, tensor in named.items()})
        return peaks

    def recording_merge_tokens(*tensors: Tensor, num_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
        merged, token_of_cell, cell_weights = merge_tokens(*tensors, num_clusters=num_clusters)
        named = {"merged_x": merged, "idx_token": token_of_cell, "agg_weight": cell_weights[..., None]}
        seen.update({f"ctm{merges}.{name}": tensor for name, tensor in named.items()})
        return merged, token_of_cell, cell_weights

    def keep_levels(_module: nn.Module, _inputs: object, levels: list[Tokens]) -> None:
        nonlocal merges
        merges = 0
        seen.update({f"stage{s}.x": level.x for s, level in enumerate(levels, start=1)})
        seen.update({f"return_map.{s}": token2map(level.x, level.links) for s, level in enumerate(levels)})
        for j, neck in enumerate(necks):
            seen.update({f"mta{j}.out{s}": fmap for s, fmap in enumerate(neck(levels))})

    monkeypatch.setattr(token_blocks, "dpc_knn", recording_dpc_knn)
    monkeypatch.setattr(token_blocks, "merge_tokens", recording_merge_tokens)
    for s, stage in enumerate(model.backbone.stages):
        if stage.ctm is not None:
            stage.ctm.score.register_forward_hook(
                lambda _module, _inputs, score, name=f"ctm{s}.token_score": seen.update({name: score})
            )
    model.backbone.register_forward_hook(keep_levels)
    model.register_forward_hook(lambda _module, _inputs, output: seen.update(logits=output[0]))
    return seen


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_golden_outputs_of_tcformer_are_reproduced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, stored = read_golden(path)
    official = json.loads(metadata["config"])
    config = config_from_official(official["backbone"])
    model = TCFormerClassifier(config, num_classes=official["num_classes"]).eval()
    load_tcformer(model, taken(stored, "sd."), num_stages=len(config.dims))
    necks = []
    for j, neck_official in enumerate(json.loads(metadata.get("mta", "[]"))):
        necks.append(Mta(config.dims, neck_from_official(neck_official)).eval())
        weights = {f"neck.{name}": tensor for name, tensor in taken(stored, f"mta{j}.sd.").items()}
        load_tcformer(nn.ModuleDict({"neck": necks[-1]}), weights)
    seen = record(model, necks, monkeypatch)

    assert_stored_outputs(model, seen, stored, metadata, needed="logits")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"qkv_bias": False}, "qkv_bias is not built"), ({"norm_cfg": None}, "norm_cfg is not built")],
)
@pytest.mark.skipif(not MODELS, reason="GOLDEN_ROOT holds no golden file of TCFormer")
def test_official_settings_that_are_not_built_are_refused(change: dict[str, object], message: str) -> None:
    metadata = read_metadata(MODELS[0])
    with pytest.raises(ValueError, match=message):
        config_from_official(json.loads(metadata["config"])["backbone"] | change)
    with pytest.raises(ValueError, match=message):
        neck_from_official(json.loads(metadata["mta"])[0] | change)
    with pytest.raises(ValueError, match="add_extra_convs=on_output is not built"):
        neck_from_official(json.loads(metadata["mta"])[0] | {"add_extra_convs": "on_output"})
