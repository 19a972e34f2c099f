"""Laws that every model of pictures keeps, at quick sizes; other models have their laws in files of their own."""

import pytest
import torch
from torch import nn

from models import BUILDERS
from tests.models.picture_laws import assert_gradients_reach_every_parameter, filled, pictures

NUM_CLASSES = 10

# Softmax ignores what it adds to all keys or to all tokens of a cluster: these biases change nothing.
WITHOUT_EFFECT = (".attention.k.bias", ".attention.clustering.out.bias")


# Without the variants that differ from another in their numbers of clusters only.
NAMES = [name for name in BUILDERS if name.startswith("paca-vit-") and not name[-1].isdigit()]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return filled(BUILDERS[request.param](num_classes=NUM_CLASSES)).eval()


@torch.no_grad()
def test_a_picture_gives_the_same_alone_and_in_a_batch(model: nn.Module) -> None:
    logits, clusters = model(pictures(64, 64))
    for i in range(2):
        logits_alone, clusters_alone = model(pictures(64, 64)[i : i + 1])
        torch.testing.assert_close(logits_alone[0], logits[i], atol=1e-5, rtol=1e-5)
        for together, alone in zip(clusters, clusters_alone, strict=True):
            torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_the_same_picture_gives_the_same_output(model: nn.Module) -> None:
    torch.testing.assert_close(model(pictures(64, 64)), model(pictures(64, 64)), atol=0, rtol=0)


@torch.no_grad()
def test_pictures_of_any_size_are_taken(model: nn.Module) -> None:
    logits, clusters = model(pictures(49, 37))
    assert logits.shape == (2, NUM_CLASSES)
    assert logits.isfinite().all()
    assert logits[0].ne(logits[1]).any()
    for assignment in clusters:
        torch.testing.assert_close(assignment.sum(dim=2), torch.ones(assignment.shape[:2]), atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter(model: nn.Module) -> None:
    model.zero_grad()
    logits, _ = model(pictures(64, 64))
    logits.square().sum().backward()
    assert_gradients_reach_every_parameter(model, without_effect=WITHOUT_EFFECT)


# SPEC of PaCa-ViT, section 6, measured with the official code: millions of parameters with 1000 classes.
PUBLISHED = {
    "paca-vit-tiny": 12.20,
    "paca-vit-small": 22.04,
    "paca-vit-base": 46.91,
    "paca-vit-small-mlp": 22.64,
    "paca-vit-small-blockwise": 24.19,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        built = BUILDERS[name](num_classes=1000)
    assert round(sum(parameter.numel() for parameter in built.parameters()) / 1e6, 2) == PUBLISHED[name]
