import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import FullAttention, padded_full_attention
from models.clustered_attention import ALONE, ClusteredAttention, ClusteredAttentionConfig, attend, draw_planes
from tests.oracles import clustered_attention as oracle

# Laws

B, H, N, S, E, D = 4, 2, 70, 50, 8, 6
QUERY_LENGTHS, KEY_LENGTHS = torch.tensor([70, 41, 3, 0]), torch.tensor([50, 33, 7, 0])


def clustered(**settings: Any) -> ClusteredAttention:
    config = {"num_clusters": 5, "top_k": 9, "bits": 24, "iterations": 4} | settings
    return ClusteredAttention(ClusteredAttentionConfig(**config), head_dim=E, seed=1)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: clustered(top_k=0),
    "improved": clustered,
    "improved l2": lambda: clustered(metric="l2"),
    "improved, no bias, scaled": lambda: clustered(has_hash_bias=False, scale=0.7),
    "full below 42": lambda: clustered(full_below=42),
    "plain, full below 42": lambda: clustered(full_below=42, top_k=0),
    "causal": lambda: clustered(is_causal=True),
    "full": FullAttention,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def heads(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, N, E, generator=rng) * 2
    k = torch.randn(B, H, S, E, generator=rng) * 2
    v = torch.randn(B, H, S, D, generator=rng)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def check_same(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None], tolerance: float) -> None:
    close(found[0], expected[0], tolerance)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None and expected[1] is not None:
        assert found[1].equal(expected[1])


def test_a_sample_gives_the_same_alone_and_unpadded(kind: str) -> None:
    core, (q, k, v) = KINDS[kind](), heads()
    out, clusters = core(q, k, v, QUERY_LENGTHS, KEY_LENGTHS)
    for b, (n, s) in enumerate(zip(QUERY_LENGTHS.tolist(), KEY_LENGTHS.tolist(), strict=True)):
        one = slice(b, b + 1)
        alone = core(q[one], k[one], v[one], QUERY_LENGTHS[one], KEY_LENGTHS[one])
        check_same(alone, (out[one], None if clusters is None else clusters[one]), 1e-6)
        if n:
            unpadded = core(q[one, :, :n], k[one, :, :s], v[one, :, :s], None, None)
            check_same(unpadded, (out[one, :, :n], None if clusters is None else clusters[one, :, :n]), 1e-6)


@pytest.mark.parametrize("filling", [1e30, math.inf, math.nan])
def test_what_padding_holds_does_not_count(kind: str, filling: float) -> None:
    # The third sample has fewer real keys than a cluster keeps, so that empty slots have to be filled with padding.
    assert KEY_LENGTHS[2] < 9
    core, (q, k, v) = KINDS[kind](), heads()
    expected = core(q, k, v, QUERY_LENGTHS, KEY_LENGTHS)
    q = q.masked_fill((torch.arange(N) >= QUERY_LENGTHS[:, None])[:, None, :, None], filling)
    is_padding = (torch.arange(S) >= KEY_LENGTHS[:, None])[:, None, :, None]
    filled = [x.masked_fill(is_padding, filling).requires_grad_() for x in (k, v)]
    found = core(q.requires_grad_(), *filled, QUERY_LENGTHS, KEY_LENGTHS)
    check_same(found, expected, 0)
    for gradient in torch.autograd.grad(found[0].square().sum(), (q, *filled)):
        assert gradient.isfinite().all()


def test_the_same_input_gives_the_same_output(kind: str) -> None:
    check_same(
        KINDS[kind]()(*heads(), QUERY_LENGTHS, KEY_LENGTHS), KINDS[kind]()(*heads(), QUERY_LENGTHS, KEY_LENGTHS), 0
    )


def test_padded_queries_and_samples_without_keys_get_zeros(kind: str) -> None:
    out, clusters = KINDS[kind]()(*heads(), QUERY_LENGTHS, torch.tensor([50, 0, 7, 3]))
    assert not out[1].any()
    assert not out[3].any()
    assert not out[2, :, 3:].any()
    assert out[0].any(dim=-1).float().mean() > 0.8  # causal attention has zeros where all kept keys are later
    if clusters is not None:
        assert (clusters[3] == 5).all()
        assert (clusters[2, :, 3:] == 5).all()
        assert (clusters[2, :, :3] < 5).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "causal"])
def test_permuting_keys_with_values_changes_nothing(kind: str) -> None:
    core, (q, k, v) = KINDS[kind](), heads()
    order = torch.randperm(S, generator=torch.Generator().manual_seed(0))
    check_same(core(q, k[:, :, order], v[:, :, order], None, None), core(q, k, v, None, None), 2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("top_k", [N, N + 5])
def test_with_every_key_kept_it_is_full_attention(top_k: int, *, is_causal: bool) -> None:
    q, _, _ = heads(dtype=torch.float64)
    k, v = heads(1, dtype=torch.float64)[0], heads(2, dtype=torch.float64)[0]
    mask = (torch.arange(N) < QUERY_LENGTHS[:, None])[:3, None, None]
    mask = mask & torch.ones(N, N).tril().bool() if is_causal else mask
    expected = F.scaled_dot_product_attention(q[:3], k[:3], v[:3], attn_mask=mask)
    out, clusters = clustered(top_k=top_k, is_causal=is_causal)(q, k, v, QUERY_LENGTHS, QUERY_LENGTHS)
    is_query = (clusters < 5)[:3]
    close(out[:3][is_query], expected[is_query], 1e-12)


@pytest.mark.parametrize("metric", ["lsh", "l2"])
def test_clusters_of_identical_queries_give_full_attention(metric: str) -> None:
    q, k, v = heads()
    q = q[:, :, :4].repeat_interleave(20, dim=2)  # four kinds of queries, a centroid starts in each
    core = clustered(top_k=0, metric=metric, num_clusters=4, bits=64)
    out, clusters = core(q, k, v, None, None)
    assert len(clusters[0, 0].unique()) == 4
    close(out, F.scaled_dot_product_attention(q, k, v), 1e-5)


def test_the_past_decides_alone_which_kept_keys_count_in_causal_attention() -> None:
    q, k, v = heads()
    v = torch.eye(S).expand(B, H, S, S)  # the output shows the weight of each key
    out, _ = clustered(is_causal=True)(q, k, v, None, None)
    assert not out.triu(diagonal=1).any()
    weights, counts = out.sum(dim=-1), (out > 0).sum(dim=-1)
    close(weights[counts > 0], torch.ones_like(weights[counts > 0]))
    assert (counts == 0).any(), "no query has all kept keys in its future; the test needs some"
    assert counts.max() == 9


def test_full_attention_is_chosen_by_the_samples_own_lengths() -> None:
    lengths = torch.tensor([42, 41, 3, 41])
    q, k, v = heads()
    mixed, clusters = clustered(full_below=42)(q, k, v, lengths, torch.tensor([41, 41, 7, 42]))
    by_clusters, same_clusters = clustered()(q, k, v, lengths, torch.tensor([41, 41, 7, 42]))
    full, _ = FullAttention()(q, k, v, lengths, torch.tensor([41, 41, 7, 42]))
    assert clusters[[0, 3]].equal(same_clusters[[0, 3]])
    assert clusters[1, :, :41].eq(ALONE).all()
    assert (clusters[2, :, 3:] == 5).all(), "padding stays C"
    close(mixed[[0, 3]], by_clusters[[0, 3]], 0)
    close(mixed[[1, 2]], full[[1, 2]], 1e-6)
    assert (by_clusters - full)[[0, 1, 3]].abs().amax(dim=(1, 2, 3)).min() > 0.1, "the two kinds must differ to tell"


# The naive loops


@pytest.mark.parametrize("metric", ["lsh", "l2"])
@pytest.mark.parametrize(
    ("top_k", "is_causal"), [(0, False), (1, False), (9, False), (60, False), (1, True), (9, True), (60, True)]
)
def test_attention_equals_the_naive_loop(top_k: int, metric: str, *, is_causal: bool) -> None:
    q, k, v = heads(dtype=torch.float64)
    core = clustered(top_k=top_k, metric=metric, is_causal=is_causal, scale=0.4)
    out, clusters = core(q, k, v, QUERY_LENGTHS, KEY_LENGTHS)
    for b, h in ((0, 1), (1, 0), (2, 1)):
        n, s = int(QUERY_LENGTHS[b]), int(KEY_LENGTHS[b])
        arrays = q[b, h, :n].numpy(), k[b, h, :s].numpy(), v[b, h, :s].numpy(), clusters[b, h, :n].tolist()
        if is_causal:
            expected = oracle.causal_improved_clustered_attention(*arrays, top_k=top_k, scale=0.4)
        elif top_k:
            expected = oracle.improved_clustered_attention(*arrays, top_k=top_k, scale=0.4)
        else:
            expected = oracle.clustered_attention(*arrays, scale=0.4)
        close(out[b, h, :n], torch.from_numpy(expected), 1e-12)


def test_padded_full_attention_equals_the_naive_loop() -> None:
    q, k, v = heads(dtype=torch.float64)
    out = padded_full_attention(q, k, v, QUERY_LENGTHS, KEY_LENGTHS, scale=0.4)
    for b, h in ((0, 1), (1, 0), (2, 1)):
        n, s = int(QUERY_LENGTHS[b]), int(KEY_LENGTHS[b])
        expected = oracle.full_attention(q[b, h, :n].numpy(), k[b, h, :s].numpy(), v[b, h, :s].numpy(), scale=0.4)
        close(out[b, h, :n], torch.from_numpy(expected), 1e-12)


# Precision, dropout, planes, config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_keeps_the_clusters_of_its_inputs(kind: str, dtype: torch.dtype) -> None:
    core, inputs = KINDS[kind](), heads(dtype=dtype)
    expected, clusters = core(*(x.float() for x in inputs), QUERY_LENGTHS, KEY_LENGTHS)
    for is_autocast in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
            out, same = core(*inputs, QUERY_LENGTHS, KEY_LENGTHS)
        assert out.isfinite().all()
        # Of a few queries another key is kept, as rounded scores tie: most numbers must agree, not all.
        error = (out.float() - expected).abs()
        assert error.quantile(0.9) < (0.01 if dtype == torch.float16 else 0.08)
        assert clusters is None or clusters.equal(same)


@pytest.mark.parametrize("kind", ["plain", "improved", "causal"])
def test_dropout_takes_weights_out_and_makes_up_for_it_while_training_only(kind: str) -> None:
    torch.manual_seed(0)
    core, (q, k, _) = KINDS[kind](), heads()
    v = torch.eye(S).expand(B, H, S, S)  # the output shows the weight of each key
    weights, _ = core(q, k, v, QUERY_LENGTHS, KEY_LENGTHS)
    core.dropout = 0.25
    close(core.eval()(q, k, v, QUERY_LENGTHS, KEY_LENGTHS)[0], weights, 0)
    dropped, _ = core.train()(q, k, v, QUERY_LENGTHS, KEY_LENGTHS)
    is_weight = weights > 0
    is_left = dropped > 0
    assert 0.7 < is_left[is_weight].float().mean() < 0.8
    close(dropped[is_left], weights[is_left] / 0.75)


def test_full_attention_drops_weights_while_training_only() -> None:
    torch.manual_seed(0)
    q, k, _ = heads()
    v = torch.eye(S).expand(B, H, S, S)
    core = FullAttention(dropout=0.25)
    weights, _ = core.eval()(q, k, v, None, None)
    for lengths in ((None, None), (torch.full((B,), N), torch.full((B,), S))):
        dropped, _ = core.train()(q, k, v, *lengths)
        is_left = dropped > 0
        assert 0.7 < is_left.float().mean() < 0.8
        close(dropped[is_left], weights[is_left] / 0.75)


def test_planes_come_from_the_seed_and_go_with_the_weights() -> None:
    config = ClusteredAttentionConfig(bits=5)
    first, second = (ClusteredAttention(config, head_dim=E, seed=seed) for seed in (1, 2))
    assert first.planes.shape == (5, E + 1)
    assert first.planes.equal(draw_planes(config, head_dim=E, seed=1))
    assert not first.planes.equal(second.planes)
    second.load_state_dict(first.state_dict())
    assert second.planes.equal(first.planes)
    assert draw_planes(ClusteredAttentionConfig(has_hash_bias=False), head_dim=E, seed=1)[:, :-1].all()
    assert not draw_planes(ClusteredAttentionConfig(has_hash_bias=False), head_dim=E, seed=1)[:, -1].any()
    assert draw_planes(ClusteredAttentionConfig(metric="l2"), head_dim=E, seed=1).shape == (0, E + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 0}, "num_clusters=0 must be at least 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"full_below": -1}, "full_below=-1 must be at least 0"),
        ({"bits": 0}, r"bits=0 must lie in \[1, 64\]"),
        ({"bits": 65}, r"bits=65 must lie in \[1, 64\]"),
        ({"metric": "cosine"}, "metric=cosine must be one of lsh, l2"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"scale": math.nan}, "scale=nan must be positive"),
        ({"is_causal": True, "top_k": 0}, "is_causal needs top_k above 0"),
        ({"is_causal": True, "full_below": 5}, "is_causal needs .* full_below 0"),
    ],
)
def test_a_config_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusteredAttentionConfig(**settings)


# Export


class AttendProgram(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = {"num_clusters": 5, "num_iterations": 3, "scale": 0.3} | settings
        self.register_buffer("planes", draw_planes(ClusteredAttentionConfig(bits=20), head_dim=E, seed=0))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, query_lengths: Tensor, key_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, self.planes, query_lengths, key_lengths, **self.settings)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:# The axis name:UserWarning")  # torch 2.13's exporter
@pytest.mark.parametrize(
    "settings",
    [{"metric": "lsh", "top_k": 6, "full_below": 30}, {"metric": "l2", "top_k": 0, "full_below": 0}],
    ids=["improved, full below 30", "plain l2"],
)
def test_the_exported_program_equals_the_function_at_other_sizes(settings: dict[str, Any]) -> None:
    program = AttendProgram(**settings).eval()
    names = ["q", "k", "v", "query_lengths", "key_lengths"]
    batch, queries, keys = (torch.export.Dim(name) for name in ("batch", "queries", "keys"))
    exported = torch.onnx.export(
        program,
        (*heads(), QUERY_LENGTHS, KEY_LENGTHS),
        dynamo=True,
        opset_version=20,
        input_names=names,
        dynamic_shapes=({0: batch, 2: queries}, {0: batch, 2: keys}, {0: batch, 2: keys}, {0: batch}, {0: batch}),
        verbose=False,
    )
    assert exported is not None
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for B2, N2, S2 in ((1, 7, 3), (2, 100, 90), (5, 33, 64), (1, 1, 1)):  # none as in the export
        rng = torch.Generator().manual_seed(N2)
        q = torch.randn(B2, H, N2, E, generator=rng) * 2
        k = torch.randn(B2, H, S2, E, generator=rng) * 2
        v = torch.randn(B2, H, S2, D, generator=rng)
        lengths = [torch.randint(0, most + 1, (B2,), generator=rng) for most in (N2, S2)]
        inputs = dict(zip(names, (q, k, v, *lengths), strict=True))
        out, clusters = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        expected, expected_clusters = program(**inputs)
        assert clusters.dtype == np.int32
        assert torch.from_numpy(clusters).equal(expected_clusters)
        close(torch.from_numpy(out), expected, 5e-6)
