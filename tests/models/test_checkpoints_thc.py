"""Names of official THC state dicts; those of BNT are in `test_brain_baselines.py`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.checkpoints import STORED_MEANS, THC, drop_encoder_aliases, load_official, split_in_projections
from models.thc import Thc
from models.thc_config import ThcConfig

CONFIG = ThcConfig(
    num_regions=8,
    sizes=(6, 2),
    identity_dim=4,
    hidden_dim=10,
    scope="batch",
    encoder="flat",
    encoder_dim=10,
    readout="concat",
    readout_dim=3,
    readout_hidden_dim=16,
)
# Official names below `attention_list.0.` and ours below `levels.0.`.
LEVEL_NAMES = {
    "transformer.self_attn.out_proj": "layer.attention.out",
    "transformer.linear1": "layer.fc1",
    "transformer.linear2": "layer.fc2",
    "transformer.norm1": "layer.norm1",
    "transformer.norm2": "layer.norm2",
    "encoder.0": "encoder.mlp.fc1",
    "encoder.2": "encoder.mlp.fc2",
    "encoder.4": "encoder.mlp.fc3",
    "norm": "norm",
}
READOUT_NAMES = {"dim_reduction.0": "reduce", "fc.0": "mlp.fc1", "fc.2": "mlp.fc2", "fc.4": "mlp.fc3"}
COMBINE_NAMES = {"0": "fc1", "2": "fc2", "4": "fc3"}


def make(config: ThcConfig, seed: int = 0) -> Thc:
    torch.manual_seed(seed)
    return Thc(config, num_classes=2)


def official(model: Thc) -> dict[str, Tensor]:
    """The model's weights as the official code writes them, the encoders without their second names."""
    ours = model.state_dict()
    theirs = {"node_identity": ours["identity"]}
    for kind in ("weight", "bias"):
        for i in range(2):
            level, readout = f"levels.{i}", f"readouts.{i}"
            joint = torch.cat([ours[f"{level}.layer.attention.{part}.{kind}"] for part in "qkv"])
            theirs[f"attention_list.{i}.transformer.self_attn.in_proj_{kind}"] = joint
            for name, target in LEVEL_NAMES.items():
                theirs[f"attention_list.{i}.{name}.{kind}"] = ours[f"{level}.{target}.{kind}"]
            for name, target in READOUT_NAMES.items():
                theirs[f"readout_list.{i}.{name}.{kind}"] = ours[f"{readout}.{target}.{kind}"]
        for name, target in COMBINE_NAMES.items():
            theirs[f"readout_list.2.{name}.{kind}"] = ours[f"combine.{target}.{kind}"]
    for i in range(2):
        if model.config.assignment == "learnable":
            theirs[f"attention_list.{i}.clustering.assignment"] = ours[f"levels.{i}.communities.weight"]
        else:
            centres = ours[f"levels.{i}.communities.centres"]
            theirs[f"attention_list.{i}.clustering.assignment.cluster_centers"] = centres
    return theirs


def aliases(state: dict[str, Tensor], owner: str = "clustering") -> dict[str, Tensor]:
    return {
        name.replace(".encoder.", f".{owner}.encoder."): tensor for name, tensor in state.items() if ".encoder." in name
    }


def load(model: Thc, state: dict[str, Tensor], **settings: Any) -> None:
    load_official(model, drop_encoder_aliases(split_in_projections(state)), THC, **settings)


@pytest.mark.parametrize("assignment", ["learnable", "ocread"])
@pytest.mark.parametrize("names", ["plain", "both", "aliases"])
def test_every_weight_of_an_official_thc_finds_its_place(names: str, assignment: Any) -> None:
    config = replace(CONFIG, assignment=assignment)
    published, loaded = make(config), make(config, seed=1)
    state = official(published)
    if names != "plain":
        state |= aliases(state)
    if names == "aliases":
        state = {name: tensor for name, tensor in state.items() if ".encoder." not in name or ".clustering." in name}
    load(loaded, state)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, published.state_dict()[name], atol=0, rtol=0)


@pytest.mark.parametrize("owner", ["clustering", "dec"])
def test_two_names_of_an_encoder_must_hold_the_same_numbers(owner: str) -> None:
    state = official(make(CONFIG))
    state |= {name: tensor + 1 for name, tensor in aliases(state, owner).items()}
    with pytest.raises(ValueError, match=r"attention_list\.0\.encoder\.0\.weight and its alias"):
        drop_encoder_aliases(state)


def test_the_alias_of_one_level_is_not_taken_for_another() -> None:
    state = official(make(CONFIG))
    assert drop_encoder_aliases(state | aliases(state)).keys() == state.keys()
    assert drop_encoder_aliases({"other.clustering.encoder.0.bias": torch.zeros(1)}).keys() == {
        "other.clustering.encoder.0.bias"
    }


@pytest.mark.parametrize("missing", ["attention_list.1.encoder.2.bias", "node_identity", "readout_list.2.4.weight"])
def test_a_missing_weight_of_thc_is_an_error(missing: str) -> None:
    state = official(make(CONFIG))
    del state[missing]
    with pytest.raises(ValueError, match="missing"):
        load(make(CONFIG), state)


def test_official_weights_bring_no_stored_means() -> None:
    published, loaded = make(CONFIG), make(replace(CONFIG, scope="stored"))
    loaded.levels[0].communities.shared.mean.fill_(3.0)
    with pytest.raises(ValueError, match=r"missing levels\.0\.communities\.shared\.mean"):
        load(loaded, official(published))
    load(loaded, official(published), kept=STORED_MEANS)
    assert (loaded.levels[0].communities.shared.mean == 3.0).all()
    torch.testing.assert_close(loaded.identity, published.identity, atol=0, rtol=0)
