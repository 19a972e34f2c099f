from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.clustered_attention import ClusteredAttentionConfig
from models.ctc_transformer import CtcTransformer, CtcTransformerConfig, count_tokens

FULL = CtcTransformerConfig(
    num_layers=2, dim=24, num_heads=2, hidden_dim=48, num_mels=20, stem_channels=4, kernel_size=5
)
CLUSTERED = replace(FULL, attention=ClusteredAttentionConfig(num_clusters=6, top_k=0, bits=16, iterations=5))
IMPROVED = replace(FULL, attention=ClusteredAttentionConfig(num_clusters=6, top_k=8, bits=16, iterations=5))
MIXED = replace(FULL, attention=ClusteredAttentionConfig(num_clusters=6, top_k=8, metric="l2", full_below=30))
LENGTHS = torch.tensor([81, 60, 17, 2, 1])
NUM_CLASSES = 7

parametrize = pytest.mark.parametrize(
    "config", [FULL, CLUSTERED, IMPROVED, MIXED], ids=["full", "clustered", "improved", "mixed"]
)


def make(config: CtcTransformerConfig) -> CtcTransformer:
    torch.manual_seed(0)
    return CtcTransformer(config, num_classes=NUM_CLASSES).eval()


def features() -> Tensor:
    return torch.randn(len(LENGTHS), int(LENGTHS.max()), FULL.num_mels, generator=torch.Generator().manual_seed(1))


@parametrize
@torch.no_grad()
def test_a_recording_gives_the_same_alone_in_a_batch_and_padded(config: CtcTransformerConfig) -> None:
    model = make(config)
    x = features()
    for row, length in zip(x, LENGTHS, strict=True):
        row[length:] = 1e3  # what stands at padding must not matter
    log_probs, clusters = model(x, LENGTHS)
    for i, length in enumerate(LENGTHS.tolist()):
        alone, alone_clusters = model(x[i : i + 1, :length], LENGTHS[i : i + 1])
        assert alone.shape == (1, (length + 1) // 2, NUM_CLASSES)
        torch.testing.assert_close(log_probs[i, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)
        for together, by_itself in zip(clusters, alone_clusters, strict=True):
            assert torch.equal(together[i, :, : alone.shape[1]], by_itself[0])


@parametrize
@torch.no_grad()
def test_it_gives_log_probabilities_and_the_clusters_of_each_layer(config: CtcTransformerConfig) -> None:
    log_probs, clusters = make(config)(features(), LENGTHS)
    N = int(count_tokens(LENGTHS).max())
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(len(LENGTHS), N), atol=1e-5, rtol=0)
    assert [tuple(made.shape) for made in clusters] == [(len(LENGTHS), 2, N)] * (2 if config.attention else 0)


@parametrize
def test_gradients_reach_every_parameter(config: CtcTransformerConfig) -> None:
    model = make(config)
    log_probs, _ = model(features(), LENGTHS)
    log_probs[..., 1].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("attention.k.bias"):  # softmax ignores what it adds to all keys
            assert parameter.grad.any(), name


@torch.no_grad()
def test_weights_of_full_attention_run_with_clusters() -> None:
    full = make(FULL)
    improved = make(replace(IMPROVED, attention=replace(IMPROVED.attention, top_k=1000)))
    missing, unexpected = improved.load_state_dict(full.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("planes") for name in missing)
    expected, _ = full(features(), LENGTHS)
    found, _ = improved(features(), LENGTHS)  # as many keys as there are: every query attends to all of them
    for i, num_tokens in enumerate(count_tokens(LENGTHS).tolist()):
        torch.testing.assert_close(found[i, :num_tokens], expected[i, :num_tokens], atol=1e-5, rtol=0)


@torch.no_grad()
def test_where_a_token_stands_matters() -> None:
    model = make(FULL)
    x = features()[:1]
    there, _ = model(x, LENGTHS[:1])
    back, _ = model(x.flip(1), LENGTHS[:1])
    assert (there.flip(1) - back).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "value"), [("kernel_size", 4), ("num_heads", 5)])
def test_settings_that_do_not_fit_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        replace(FULL, **{name: value})
