import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import BUILDERS
from models.attention import FullAttention
from models.checkpoints import BERT_ENCODER, MAX_NAMED, load_official, paca_vit_renames, split_in_projections
from models.encoder import EncoderConfig, TransformerEncoder
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


def test_of_many_faults_of_a_kind_some_are_named_and_the_others_counted() -> None:
    strays = {f"stray{i}": torch.zeros(1) for i in range(MAX_NAMED + 7)}
    with pytest.raises(ValueError, match=rf"stray{MAX_NAMED - 1}; and 7 more like it; missing fc\.bias$") as caught:
        load_official(model(), {"layer.weight": torch.zeros(3, 2)} | strays, RENAMES)
    assert f"stray{MAX_NAMED}" not in str(caught.value)


def test_a_tensor_of_ours_that_is_named_keeps_its_value() -> None:
    loaded = model()
    bias = loaded["fc"].bias.detach().clone()
    load_official(loaded, {"layer.weight": torch.full((3, 2), 2.0)}, RENAMES, kept=r"fc\.bias")
    torch.testing.assert_close(loaded["fc"].weight, torch.full((3, 2), 2.0), atol=0, rtol=0)
    torch.testing.assert_close(loaded["fc"].bias, bias, atol=0, rtol=0)


def test_only_whole_names_keep_their_value() -> None:
    with pytest.raises(ValueError, match=r"missing fc\.bias"):
        load_official(model(), {"layer.weight": torch.zeros(3, 2)}, RENAMES, kept="bias")


def test_the_joint_projections_of_torch_are_split_in_order() -> None:
    joint = nn.MultiheadAttention(2, 1)
    weight, bias = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)
    state = joint.state_dict() | {"in_proj_weight": weight, "in_proj_bias": bias}
    for prefix in ("", "layers.0.self_attn."):
        split = split_in_projections({f"{prefix}{name}": tensor for name, tensor in state.items()})
        assert set(split) == {f"{prefix}{x}.{kind}" for x in ("q", "k", "v", "out_proj") for kind in ("weight", "bias")}
        for i, part in enumerate("qkv"):
            torch.testing.assert_close(split[f"{prefix}{part}.weight"], weight[2 * i : 2 * i + 2], atol=0, rtol=0)
            torch.testing.assert_close(split[f"{prefix}{part}.bias"], bias[2 * i : 2 * i + 2], atol=0, rtol=0)


# Names of transformers' BertEncoder, below `encoder.`, and ours.
BERT_NAMES = {
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "norm2",
}


def test_every_weight_of_a_bert_encoder_finds_its_place() -> None:
    config = EncoderConfig(num_layers=11, dim=4, num_heads=2, hidden_dim=6, activation="gelu", has_final_norm=False)
    published, loaded = (TransformerEncoder(config, lambda _: FullAttention()) for _ in range(2))
    for parameter in published.parameters():
        nn.init.normal_(parameter)
    ours = published.state_dict()
    theirs = {
        f"layer.{i}.{name}.{kind}": ours[f"layers.{i}.{target}.{kind}"]
        for i in range(11)
        for name, target in BERT_NAMES.items()
        for kind in ("weight", "bias")
    }
    load_official(loaded, theirs, BERT_ENCODER)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, ours[name], atol=0, rtol=0)


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
