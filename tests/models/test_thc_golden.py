"""THC in its published layout beside the official code, on every golden file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.checkpoints import THC, drop_encoder_aliases, load_official, split_in_projections
from models.thc import LevelOutput, Thc
from models.thc_config import ThcConfig
from tests.golden_files import golden_files

GOLDEN = golden_files("clustered_attention_and_thc", "thc_")
TOLERANCE = 2e-5  # absolute, of the golden README
NUM_HEADS = 4  # a constant of the official code, as the next two
LAST_READOUT = {"readout_dim": 8, "readout_hidden_dim": 256}


def read_golden(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with np.load(path) as file:
        return json.loads(file["config_json"].tobytes()), {
            name: torch.from_numpy(file[name]) for name in file.files if name != "config_json"
        }


def official_config(official: dict[str, Any]) -> ThcConfig:
    """Our settings for a config of the official code, whose defaults hold where it is silent."""
    is_learnable = official.get("clustering_type", "ocread") == "learnable"
    hidden_dim = official.get("transformer_hidden_size", 1024)
    if official.get("hierarchical", False):
        readout: dict[str, Any] = {
            "readout": official.get("readout", "concat"),
            "readout_dim": official.get("feature_reduction_dim", 128),
            "readout_hidden_dim": official.get("readout_hidden_size", 256),
        }
    else:
        readout = {"readout": "global" if official.get("global_pooling", False) else "last"} | LAST_READOUT
    return ThcConfig(
        num_regions=official["node_num"],
        sizes=tuple(official["sizes"]),
        pooling=tuple(official["pooling"]),
        identity_dim=official["pos_embed_dim"] if official["pos_encoding"] == "identity" else 0,
        num_heads=NUM_HEADS,
        hidden_dim=hidden_dim,
        assignment="learnable" if is_learnable else "ocread",
        scope="batch" if is_learnable or official.get("average_assignment", False) else "subject",
        has_orthogonal_start=False,  # the weights are loaded
        has_top_k_mask=official.get("mask_top_k", False),
        min_kept=0,
        similarity="projection" if official["project_assignment"] else "student-t",
        are_centres_frozen=official.get("freeze_center", False),
        encoder="none" if official.get("no_encoder", False) else "flat",
        encoder_dim=hidden_dim,
        has_attention_noise=official.get("att_noise", False),
        **readout,
    )


def build_golden(path: Path) -> tuple[Thc, dict[str, Tensor]]:
    official, stored = read_golden(path)
    model = Thc(official_config(official), num_classes=stored["logits"].shape[1]).eval()
    state = {name.removeprefix("sd."): tensor for name, tensor in stored.items() if name.startswith("sd.")}
    load_official(model, drop_encoder_aliases(split_in_projections(state)), THC)
    return model, stored


def assert_near(found: Tensor, stored: Tensor) -> None:
    torch.testing.assert_close(found, stored, atol=TOLERANCE, rtol=0)


def test_there_are_golden_files_of_thc() -> None:
    assert GOLDEN != []


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@torch.no_grad()
def test_golden_levels_and_logits_of_thc_are_reproduced(path: Path) -> None:
    model, stored = build_golden(path)
    found: dict[str, Tensor] = {}

    def record(level: int, seen: LevelOutput) -> None:
        found[f"layer{level}.attn_logits_mean"] = seen.scores
        found[f"layer{level}.output"] = seen.nodes
        if seen.assignment is not None:
            found[f"layer{level}.assignment"] = seen.assignment

    for i, level in enumerate(model.levels):
        level.register_forward_hook(lambda module, inputs, output, i=i: record(i, output))
    output = model(stored["x"])
    assert found.keys() == {name for name in stored if name.startswith("layer")}
    for name, tensor in found.items():  # what the batch shares stands there without its axis
        assert_near(tensor, stored[name].expand_as(tensor))
    assert_near(output.logits, stored["logits"])
    for given, name in zip(output.assignments, sorted(n for n in found if n.endswith("assignment")), strict=True):
        assert given.equal(found[name])
    assert_near(model(stored["x"][:1]).logits, stored["logits_first_subject_alone"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_losses_and_gradients_of_thc_are_reproduced(path: Path) -> None:
    model, stored = build_golden(path)
    logits, _, losses = model(stored["x"])
    assert losses.keys() == {"cluster"}
    cross_entropy = F.cross_entropy(logits, stored["label"])
    total = cross_entropy + losses["cluster"]
    total.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert_near(cross_entropy, stored["ce_loss"][0])
    assert_near(losses["cluster"], stored["cluster_loss"][0])
    assert_near(total, stored["total_loss"][0])
    assert_near(torch.stack([gradient.norm() for gradient in gradients]).norm(), stored["grad_norm_total"][0])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_state_dicts_of_thc_load_with_their_aliases_and_lose_nothing(path: Path) -> None:
    official, stored = read_golden(path)
    model, _ = build_golden(path)
    state = {
        name: stored["sd." + name.replace(".clustering.encoder.", ".encoder.")] for name in official["state_dict_keys"]
    }
    loaded = Thc(official_config(official), num_classes=stored["logits"].shape[1])
    load_official(loaded, drop_encoder_aliases(split_in_projections(state)), THC)
    for name, tensor in loaded.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name
    biases = [name for name in official["state_dict_keys"] if name.endswith("bias") and ".clustering." not in name]
    split = sum(name.endswith("in_proj_bias") for name in biases)  # one there, three here
    assert sum(name.endswith("bias") for name in loaded.state_dict()) == len(biases) + 2 * split
