from dataclasses import replace

import pytest
import torch

from benchmarks.clustering_rows import ROWS, Row, count_attention, make_model, spread_layers
from models.clustered_attention import ClusteredAttentionConfig
from models.ctc_transformer import CtcTransformer, CtcTransformerConfig

FULL = CtcTransformerConfig(num_layers=6, dim=16, num_heads=2, hidden_dim=16, num_mels=8, stem_channels=2)
IMPROVED = ClusteredAttentionConfig(num_clusters=5, top_k=3, bits=7, iterations=4)


def make_full() -> CtcTransformer:
    torch.manual_seed(0)
    return CtcTransformer(FULL, num_classes=4).eval()


def test_the_layers_taken_are_spread_evenly_and_keep_their_order() -> None:
    state = make_full().state_dict()
    taken = spread_layers(state, 4)
    for place, layer in enumerate((0, 2, 3, 5)):
        assert torch.equal(taken[f"layers.{place}.fc1.weight"], state[f"layers.{layer}.fc1.weight"])
    assert torch.equal(taken["head.weight"], state["head.weight"])
    assert not [name for name in taken if name.startswith("layers.4.")]


def test_more_layers_than_there_are_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match="6 layers; a row needs 7"):
        spread_layers(make_full().state_dict(), 7)


@torch.no_grad()
def test_every_row_starts_from_the_same_weights_whatever_clustered_them() -> None:
    full = make_full()
    x, lengths = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([40, 31])
    expected, _ = full(x, lengths)
    clustered = CtcTransformer(replace(FULL, attention=IMPROVED), num_classes=4)
    missing, _ = clustered.load_state_dict(full.state_dict(), strict=False)
    assert all(name.endswith("planes") for name in missing)
    half = {name: tensor.half() for name, tensor in clustered.state_dict().items()}  # as weights ship
    row = Row(name="full", num_layers=6)
    found, clusters = make_model(row, FULL, half).eval()(x, lengths)
    assert clusters == []
    torch.testing.assert_close(found[0], expected[0], atol=1e-2, rtol=0)  # float16 holds three digits
    all_keys = replace(IMPROVED, top_k=20)  # as many as there are tokens: the same as full attention
    same, clusters = make_model(replace(row, attention=all_keys), FULL, full.state_dict()).eval()(x, lengths)
    assert len(clusters) == 6
    torch.testing.assert_close(same[0], expected[0], atol=1e-5, rtol=0)


def test_costs_are_those_of_the_formula() -> None:
    assert count_attention(FULL, 10) == (6 * 2 * 10 * 10 * 16, 0)
    one = replace(FULL, num_layers=1, attention=IMPROVED)
    hashes, clusters, own = 10 * 16 * 7, 2 * 5 * 10 * 16, 2 * 10 * 3 * 16
    assert count_attention(one, 10) == (hashes + clusters + own, 4 * 2 * 10 * 5)
    plain = replace(one, attention=replace(IMPROVED, top_k=0))
    assert count_attention(plain, 10) == (hashes + clusters, 4 * 2 * 10 * 5)


def test_twice_the_length_costs_twice_as_much_with_clusters_and_four_times_as_much_without() -> None:
    clustered = replace(FULL, attention=IMPROVED)
    assert [2 * cost for cost in count_attention(clustered, 500)] == list(count_attention(clustered, 1000))
    assert 4 * count_attention(FULL, 500).multiply_adds == count_attention(FULL, 1000).multiply_adds


def test_the_rows_compare_like_with_like() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.attention is None or row.attention.full_below == 0
        if row.weights_of is not None:
            assert row.weights_of in ROWS
            assert row.weights_of.attention is None
            assert row.weights_of.num_layers == row.num_layers
