"""Clustered attention beside the official one, stage by stage, on every golden file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention_by_clusters import (
    causal_improved_clustered_attention,
    cluster_scores,
    clustered_attention,
    improved_clustered_attention,
    masked_weights,
    split_weights,
    strongest_keys,
)
from models.cluster_blocks import make_blocks, past_slots, per_query, real_slots, slot_scores, slot_values
from models.clustering import group_queries, hash_bits, lloyd, take_rows
from tests.golden_files import golden_files

GOLDEN = golden_files("clustered_attention_and_thc", "clustered_", "improved_", "causal_improved_")
# Largest absolute differences that the golden README allows; 1e-5 where nothing stands here.
TOLERANCES = {"qk_centroid": 1e-4, "qk_topk": 1e-4, "grad_q": 5e-5, "grad_k": 5e-5, "grad_v": 5e-5}
TIE = 1e-5  # of a projection, below which a bit may flip; at most 2 in 100,000 do


def read_golden(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with np.load(path) as file:
        config = json.loads(file["config_json"].tobytes())
        stored = {name: torch.from_numpy(file[name]) for name in file.files if name != "config_json"}
    for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"):
        stored[name] = stored[name].transpose(1, 2)  # (B, H, N, D)
    stored["clusters"] = stored["clusters"].long().clamp(max=config["clusters"])  # padding: C + 1 there, C here
    return config, stored


def unpack_bits(hashes: Tensor, num_planes: int) -> Tensor:
    return (hashes[..., None] >> torch.arange(num_planes) & 1).float() * 2 - 1


def by_key(per_slot: Tensor, keys: Tensor, num_keys: int) -> Tensor:
    """Slots (…, K) in any order → (…, S): what stands for each key, 0 for keys that have no slot."""
    return per_slot.new_zeros(*per_slot.shape[:-1], num_keys).scatter(-1, keys, per_slot)


def attend_golden(config: dict[str, Any], stored: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    settings: dict[str, Any] = {"num_clusters": config["clusters"], "scale": config["softmax_temp"]}
    inputs = (q, k, v, stored["clusters"], stored["key_lengths"])
    if config["kind"] == "clustered":
        return clustered_attention(*inputs, **settings)
    settings["top_k"] = stored["topk_idx"].shape[3]  # official: min(topk, S), causal also the fewest keys of a sample
    if config["kind"] == "improved-clustered":
        return improved_clustered_attention(*inputs, **settings)
    assert config["kind"] == "causal-improved-clustered"
    return causal_improved_clustered_attention(*inputs, **settings)


def stages(config: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every stage given the stored clusters, under the names of the file; slots are spread over keys by `by_key`."""
    q, k, v, clusters, lengths = (stored[name] for name in ("q", "k", "v", "clusters", "key_lengths"))
    scale = config["softmax_temp"] or q.shape[3] ** -0.5
    is_key = (torch.arange(k.shape[2]) < lengths[:, None])[:, None]
    seen: dict[str, Tensor] = {}
    seen["q_grouped"] = group_queries(q, clusters, num_clusters=config["clusters"])
    seen["qk_centroid"] = cluster_scores(seen["q_grouped"], k, is_key)
    seen["a_centroid"] = masked_weights(seen["qk_centroid"], is_key[:, :, None], scale=scale)
    if config["kind"] == "clustered":
        return seen | {"v_centroid": seen["a_centroid"] @ v}
    kept = strongest_keys(seen["qk_centroid"], stored["topk_idx"].shape[3])
    rest, mass = split_weights(seen["a_centroid"], kept)
    blocks = make_blocks(clusters, kept)
    scores = slot_scores(q, k, blocks)
    is_seen = real_slots(blocks, lengths)
    if config["kind"] == "improved-clustered":
        seen |= {"v_centroid_bottomk": rest @ v, "a_bottomk_mass": mass}
        weights = masked_weights(scores, is_seen, scale=scale)
        weights = weights * (1 - take_rows(mass[..., None], blocks.clusters)[..., None])
        seen["v_topk"] = slot_values(weights, v, blocks)
    else:
        weights = masked_weights(scores, is_seen & past_slots(blocks), scale=scale)
    keys = of_query(kept, clusters)
    seen["topk_idx"] = by_key(torch.ones_like(kept), kept, k.shape[2])
    seen["qk_topk"] = by_key(per_query(scores, blocks), keys, k.shape[2])
    seen["a_topk"] = by_key(per_query(weights, blocks), keys, k.shape[2])
    return seen


def of_query(per_cluster: Tensor, clusters: Tensor) -> Tensor:
    """(B, H, C, K), clusters (B, H, N) → (B, H, N, K); any row for padded queries."""
    return take_rows(per_cluster, clusters.clamp(max=per_cluster.shape[2] - 1))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_clusters_of_clustered_attention_are_reproduced(path: Path) -> None:
    config, stored = read_golden(path)
    planes, C = stored["planes"], config["clusters"]
    assert (config["bits"], config["hash_bias"]) == (planes.shape[0], bool(planes[:, -1].any()))
    is_query = torch.arange(stored["q"].shape[2]) < stored["query_lengths"][:, None]
    expected = unpack_bits(stored["hashes"], config["bits"])
    flipped = hash_bits(stored["q"], planes) != expected
    distances = (stored["q"] @ planes[:, :-1].T - planes[:, -1])[flipped].abs()
    assert (distances < TIE).all()
    assert flipped.sum() <= 2e-5 * flipped.numel()

    start = unpack_bits(stored["init_centroids"], config["bits"])
    clusters, centroids = lloyd(expected, start, is_query, num_iterations=config["iterations"], metric="lsh")
    assert clusters.equal(stored["clusters"])
    assert centroids.equal(unpack_bits(stored["final_centroids"], config["bits"]))
    assert F.one_hot(clusters, C + 1).sum(dim=2)[..., :C].equal(stored["counts"].long())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_stages_of_clustered_attention_are_reproduced(path: Path) -> None:
    config, stored = read_golden(path)
    seen = stages(config, stored)
    expected = {name: stored[name] for name in stored if name in seen}
    assert expected.keys() == seen.keys()
    is_key = torch.arange(stored["k"].shape[2]) < stored["key_lengths"][:, None]  # (B, S)
    is_query = torch.arange(stored["q"].shape[2]) < stored["query_lengths"][:, None]
    if "topk_idx" in expected:
        kept, num_keys = expected["topk_idx"], stored["k"].shape[2]
        keys = of_query(kept, stored["clusters"])
        expected["topk_idx"] = by_key(torch.ones_like(kept), kept, num_keys)
        for name in ("qk_topk", "a_topk"):
            expected[name] = by_key(expected[name], keys, num_keys)
    errors = {}
    for name, want in expected.items():
        assert seen[name].shape == want.shape, name
        matters = torch.ones_like(want, dtype=torch.bool)
        if name in {"qk_centroid", "topk_idx", "qk_topk", "a_topk"}:  # one number per key
            matters &= is_key[:, None, None]
        if name in {"qk_topk", "a_topk", "v_topk"}:  # one row per query
            matters &= is_query[:, None, :, None]
        if name in {"topk_idx", "a_bottomk_mass", "v_centroid_bottomk"}:  # an empty cluster may keep any keys
            matters &= (stored["counts"] > 0).reshape(*want.shape[:3], *[1] * (want.dim() - 3))
        errors[name] = (seen[name] - want)[matters].abs().max().item()
    assert {name: error for name, error in errors.items() if not error <= TOLERANCES.get(name, 1e-5)} == {}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_outputs_and_gradients_of_clustered_attention_are_reproduced(path: Path) -> None:
    config, stored = read_golden(path)
    inputs = [stored[name].clone().requires_grad_() for name in ("q", "k", "v")]
    out = attend_golden(config, stored, *inputs)
    gradients = torch.autograd.grad(out, inputs, stored["grad_out"])
    for name, found in zip(("out", "grad_q", "grad_k", "grad_v"), (out, *gradients), strict=True):
        torch.testing.assert_close(found, stored[name], atol=TOLERANCES.get(name, 1e-5), rtol=0)
