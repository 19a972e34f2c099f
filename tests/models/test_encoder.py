import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import attention_by_clusters, clustered_attention
from models.attention import FullAttention
from models.checkpoints import (
    FAST_TRANSFORMERS_ENCODER,
    HASH_PLANES,
    TORCH_ENCODER,
    load_official,
    split_in_projections,
)
from models.clustered_attention import ClusteredAttention, ClusteredAttentionConfig
from models.clustering import hash_bits, lloyd
from models.encoder import EncoderConfig, TransformerEncoder
from tests.golden_files import golden_files

GOLDEN = golden_files("clustered_attention_and_thc", "encoder_")
GOLDEN_TOLERANCE = 2e-5  # absolute, of the golden README
TIE = 1e-5  # of a projection, below which a bit may flip; at most 2 in 100,000 do


def read_golden(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with np.load(path) as file:
        return json.loads(file["config_json"].tobytes()), {
            name: torch.from_numpy(file[name]) for name in file.files if name != "config_json"
        }


def build_golden(official: dict[str, Any], stored: dict[str, Tensor]) -> TransformerEncoder:
    """Our encoder with the official settings, weights and planes."""

    def make_core(layer: int) -> nn.Module:
        kind = official["attention_type"]
        if kind == "full":
            return FullAttention()
        assert kind in {"clustered", "improved-clustered", "causal-improved-clustered"}
        planes = stored[f"layer{layer}.planes"]
        assert len(planes) == official["bits"]
        config = ClusteredAttentionConfig(
            num_clusters=official["clusters"],
            # Official: min(topk, N), causal also the fewest keys of a sample.
            top_k=0 if kind == "clustered" else stored[f"layer{layer}.topk_idx"].shape[3],
            bits=official["bits"],
            iterations=official["iterations"],
            scale=official.get("softmax_temp"),
            is_causal=kind.startswith("causal"),
        )
        core = ClusteredAttention(config, head_dim=official["query_dimensions"], seed=0)
        core.planes.copy_(planes)
        return core

    config = EncoderConfig(
        num_layers=official["n_layers"],
        dim=stored["x"].shape[2],
        num_heads=official["n_heads"],
        hidden_dim=official["feed_forward_dimensions"],
        head_dim=official["query_dimensions"],
        value_dim=official["value_dimensions"],
        activation=official["activation"],
        dropout=official["dropout"],
        has_final_norm=official["final_normalization"],
    )
    model = TransformerEncoder(config, make_core).eval()
    state = {name.removeprefix("sd."): stored[name] for name in stored if name.startswith("sd.")}
    load_official(model, state, FAST_TRANSFORMERS_ENCODER, kept=HASH_PLANES)
    return model


def unpack_bits(hashes: Tensor, num_planes: int) -> Tensor:
    return (hashes[..., None] >> torch.arange(num_planes) & 1).float() * 2 - 1


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@torch.no_grad()
def test_golden_encoders_with_clustered_attention_are_reproduced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official, stored = read_golden(path)
    model = build_golden(official, stored)
    is_real = torch.arange(stored["x"].shape[1]) < stored["lengths"][:, None]  # (B, N)
    kept: list[Tensor] = []
    strongest_keys = attention_by_clusters.strongest_keys

    def cluster_as_stored(
        q: Tensor, planes: Tensor, lengths: Tensor, *, num_clusters: int, num_iterations: int, metric: str
    ) -> Tensor:
        """Hold our bits and clusters to the stored ones, and go on with those."""
        assert metric == "lsh"
        assert lengths.equal(stored["lengths"])
        i = next(layers)
        expected = unpack_bits(stored[f"layer{i}.hashes"], len(planes))
        flipped = hash_bits(q, planes) != expected
        assert ((q @ planes[:, :-1].T - planes[:, -1])[flipped].abs() < TIE).all()
        assert flipped.sum() <= 2e-5 * flipped.numel()
        start = unpack_bits(stored[f"layer{i}.init_centroids"], len(planes))
        clusters, _ = lloyd(expected, start, is_real, num_iterations=num_iterations, metric="lsh")
        assert clusters.equal(stored[f"layer{i}.clusters"].long().clamp(max=num_clusters))
        counts = F.one_hot(clusters, num_clusters + 1).sum(dim=2)[..., :num_clusters]
        assert counts.equal(stored[f"layer{i}.counts"].long())
        return clusters

    def strongest_keys_recorded(scores: Tensor, top_k: int) -> Tensor:
        kept.append(strongest_keys(scores, top_k))
        return kept[-1]

    layers = iter(range(official["n_layers"]))
    monkeypatch.setattr(clustered_attention, "cluster_queries", cluster_as_stored)
    monkeypatch.setattr(attention_by_clusters, "strongest_keys", strongest_keys_recorded)
    y = model(stored["x"], stored["lengths"])

    assert y.shape == stored["y"].shape
    # Full attention: the official code lets padded queries attend, ours gives them zeros.
    matters = is_real if official["attention_type"] == "full" else torch.ones_like(is_real)
    torch.testing.assert_close(y[matters], stored["y"][matters], atol=GOLDEN_TOLERANCE, rtol=0)
    if official["attention_type"] != "full":
        assert next(layers, None) is None, "a layer made no clusters"
    for i, found in enumerate(kept):
        expected = stored[f"layer{i}.topk_idx"]
        is_used = (stored[f"layer{i}.counts"] > 0)[..., None] & is_real[:, None, None]
        none = torch.zeros(*expected.shape[:3], is_real.shape[1], dtype=torch.bool)
        assert (none.scatter(3, found, value=True) & is_used).equal(none.scatter(3, expected, value=True) & is_used)


# Laws

B, N, E, H = 3, 40, 12, 2
LENGTHS = torch.tensor([40, 23, 2])
CONFIG = EncoderConfig(num_layers=2, dim=E, num_heads=H, hidden_dim=20, head_dim=8, value_dim=5)


def clustered(**settings: Any) -> Callable[[int], nn.Module]:
    config = ClusteredAttentionConfig(**({"num_clusters": 4, "top_k": 6, "bits": 20, "iterations": 3} | settings))
    return lambda layer: ClusteredAttention(config, head_dim=8, seed=layer)


CORES: dict[str, Callable[[int], nn.Module]] = {
    "plain": clustered(top_k=0),
    "improved": clustered(),
    "improved l2": clustered(metric="l2"),
    "full below 24": clustered(full_below=24),
    "causal": clustered(is_causal=True),
    "full": lambda _: FullAttention(),
}


@pytest.fixture(params=CORES)
def model(request: pytest.FixtureRequest) -> TransformerEncoder:
    torch.manual_seed(0)
    built = TransformerEncoder(CONFIG, CORES[request.param]).eval()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built


def tokens() -> Tensor:
    return torch.randn(B, N, E, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_sample_gives_the_same_alone_and_unpadded(model: TransformerEncoder) -> None:
    y, clusters = model.encode_with_clusters(tokens(), LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        one = slice(b, b + 1)
        alone, clusters_alone = model.encode_with_clusters(tokens()[one, :length])
        torch.testing.assert_close(alone, y[one, :length], atol=5e-6, rtol=0)
        assert [x.tolist() for x in clusters_alone] == [x[one, :, :length].tolist() for x in clusters]


@torch.no_grad()
def test_what_stands_at_padding_does_not_count(model: TransformerEncoder) -> None:
    is_padding = torch.arange(N) >= LENGTHS[:, None]
    other = tokens().masked_fill(is_padding[..., None], 1e3)
    y, changed = model(tokens(), LENGTHS), model(other, LENGTHS)
    torch.testing.assert_close(changed[~is_padding], y[~is_padding], atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_same_input_gives_the_same_output(model: TransformerEncoder) -> None:
    torch.testing.assert_close(model(tokens(), LENGTHS), model(tokens(), LENGTHS), atol=0, rtol=0)


def test_gradients_reach_every_parameter(model: TransformerEncoder) -> None:
    model.zero_grad()
    model(tokens(), LENGTHS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name.endswith(".k.bias"), name  # softmax ignores what it adds to all keys


def test_each_clustered_layer_hands_on_its_clusters() -> None:
    model = TransformerEncoder(CONFIG, lambda i: FullAttention() if i else CORES["improved"](i)).eval()
    y, clusters = model.encode_with_clusters(tokens(), LENGTHS)
    assert len(clusters) == 1
    assert clusters[0].shape == (B, H, N)
    assert (clusters[0] == 4).equal((torch.arange(N) >= LENGTHS[:, None])[:, None].expand(B, H, N))
    torch.testing.assert_close(model(tokens(), LENGTHS), y, atol=0, rtol=0)


def test_layers_have_planes_of_their_own() -> None:
    first, second = (layer.attention.core.planes for layer in TransformerEncoder(CONFIG, CORES["improved"]).layers)
    assert not first.equal(second)


@pytest.mark.parametrize("has_final_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_it_equals_the_encoder_of_torch_under_its_weights(activation: str, *, has_final_norm: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 20, activation=activation, batch_first=True)
    norm = nn.LayerNorm(E) if has_final_norm else None
    theirs = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = EncoderConfig(
        num_layers=2, dim=E, num_heads=H, hidden_dim=20, activation=activation, has_final_norm=has_final_norm
    )
    ours = TransformerEncoder(config, lambda _: FullAttention())
    load_official(ours, split_in_projections(theirs.state_dict()), TORCH_ENCODER)
    is_padding = torch.arange(N) >= LENGTHS[:, None]
    expected = theirs.eval()(tokens(), src_key_padding_mask=is_padding)
    found = ours.eval()(tokens(), LENGTHS)
    torch.testing.assert_close(found[~is_padding], expected[~is_padding], atol=1e-5, rtol=0)


def test_dropout_acts_while_training_only() -> None:
    torch.manual_seed(0)
    model = TransformerEncoder(CONFIG, CORES["full"])
    assert not model(tokens()).equal(model(tokens()))
    assert model.eval()(tokens()).equal(model(tokens()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "tanh"}, "activation=tanh must be one of relu, gelu"),
        ({"num_heads": 5, "head_dim": None}, "num_heads=5 must divide model_dim=12"),
        ({"num_heads": 5, "value_dim": None}, "num_heads=5 must divide model_dim=12"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)
