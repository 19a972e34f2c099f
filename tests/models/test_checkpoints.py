import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import BUILDERS
from models.checkpoints import load_official, paca_vit_renames
from models.paca_vit import PaCaViTClassifier

RENAMES = ((r"layer\.(\w+)", r"fc.\1"), (r"alias\.(\w+)", r"fc.\1"))


def model() -> nn.Module:
    return nn.ModuleDict({"fc": nn.Linear(2, 3)})


def state() -> dict[str, Tensor]:
    return {"layer.weight": torch.full((3, 2), 2.0), "layer.bias": torch.full((3,), 3.0)}


def test_tensors_are_loaded_under_their_new_names() -> None:
    loaded = model()
    load_official(loaded, state(), RENAMES)
    torch.testing.assert_close(loaded.state_dict()["fc.weight"], torch.full((3, 2), 2.0), atol=0, rtol=0)
    torch.testing.assert_close(loaded.state_dict()["fc.bias"], torch.full((3,), 3.0), atol=0, rtol=0)


def test_a_pointwise_convolution_becomes_a_linear_layer() -> None:
    loaded, weight = model(), torch.randn(3, 2)
    load_official(loaded, state() | {"layer.weight": weight[:, :, None, None]}, RENAMES)
    torch.testing.assert_close(loaded.state_dict()["fc.weight"], weight, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer.bias": None}, r"missing fc\.bias"),
        ({"other.weight": torch.zeros(1)}, r"unexpected other\.weight"),
        ({"my_layer.weight": torch.zeros(3, 2)}, r"unexpected my_layer\.weight"),
        ({"layer.scale": torch.zeros(3)}, r"unexpected layer\.scale"),
        ({"alias.bias": torch.zeros(3)}, r"alias\.bias comes twice"),
        ({"layer.weight": torch.zeros(3, 4)}, r"fc\.weight has shape \(3, 4\), expected \(3, 2\)"),
        ({"layer.weight": torch.zeros(3, 2, 3, 3)}, r"fc\.weight has shape \(3, 2, 3, 3\), expected \(3, 2\)"),
    ],
    ids=["missing", "unexpected", "only the end fits", "renamed to nothing", "doubled", "wrong shape", "no pointwise"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    kept, changed = model(), state() | change
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_official(kept, {name: tensor for name, tensor in changed.items() if tensor is not None}, RENAMES)
    for name, tensor in kept.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def test_every_fault_of_a_checkpoint_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"unexpected other.*missing fc\.weight.*missing fc\.bias"):
        load_official(model(), {"other": torch.zeros(1)}, RENAMES)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("paca-vit-tiny", "pacavit_tiny_p2cconv_100_0"),
        ("paca-vit-small", "pacavit_small_p2cconv_100_0"),
        ("paca-vit-small-mlp", "pacavit_small_p2cmlp_100_0"),
        ("paca-vit-small-blockwise", "pacavit_small_p2cconv_100_blockwise"),
        ("paca-vit-base", "pacavit_base_p2cconv_100_0"),
    ],
)
def test_names_and_shapes_of_the_published_checkpoints_fit(
    name: str, official: str, shared_file: Callable[[str], Path]
) -> None:
    keys = json.loads(shared_file(f"reference/tcformer_and_paca_vit/official_keys/{official}.json").read_text())
    with torch.device("meta"):
        built: PaCaViTClassifier = BUILDERS[name](num_classes=1000)
        published = {key: torch.empty(value["shape"]) for key, value in keys["state_dict"].items()}
    config = built.backbone.config
    load_official(built, published, paca_vit_renames(config.clustering, num_stages=len(config.dims)))
