import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import paca_vit
from models.checkpoints import Renames, load_official, paca_vit_renames
from models.checkpoints_tcformer import (
    WRAPPERS,
    flatten_skips,
    load_tcformer,
    official_state,
    paca_seg_renames,
    paca_teacher_renames,
    tcformer_renames,
)
from models.paca_seg import PACA_SEG_BASE, PACA_SEG_SMALL, PACA_SEG_TINY, PaCaSegmenter
from models.paca_teacher import (
    PACA_TEACHER_BASE,
    PACA_TEACHER_SMALL,
    PACA_TEACHER_TINY,
    PaCaTeacherConfig,
    PaCaTeacherViTClassifier,
)
from models.paca_vit import PaCaViTClassifier, PaCaViTConfig
from models.tcformer import TCFORMER_BASE, TCFORMER_LARGE, TCFORMER_LIGHT, TCFormerClassifier, TCFormerKeypoints

Case = tuple[Callable[[], nn.Module], Renames]


def vit(config: PaCaViTConfig) -> Case:
    return lambda: PaCaViTClassifier(config, num_classes=1000), paca_vit_renames(config.clustering, num_stages=4)


def teacher(config: PaCaTeacherConfig) -> Case:
    return lambda: PaCaTeacherViTClassifier(config, num_classes=1000), paca_teacher_renames(num_stages=4)


def seg(config: PaCaViTConfig) -> Case:
    return lambda: PaCaSegmenter(config, num_classes=150), paca_seg_renames(config.clustering, num_stages=4)


def tcformer(build: Callable[..., nn.Module], *args: Any, **settings: Any) -> Case:
    return lambda: build(*args, **settings), tcformer_renames(num_stages=4)


CASES: dict[str, Case] = {
    "pacahead_pacavit_tiny_p2cconv_100_0_ade20k": seg(PACA_SEG_TINY),
    "pacahead_pacavit_small_p2cconv_100_0_ade20k": seg(PACA_SEG_SMALL),
    "pacahead_pacavit_base_p2cconv_100_0_ade20k": seg(PACA_SEG_BASE),
    "pacavit_convmixer_tiny_100": teacher(PACA_TEACHER_TINY),
    "pacavit_convmixer_small_100": teacher(PACA_TEACHER_SMALL),
    "pacavit_convmixer_base_100": teacher(PACA_TEACHER_BASE),
    "pacavit_tiny_p2cconv_100_0": vit(paca_vit.PACA_VIT_TINY),
    "pacavit_small_p2cconv_100_0": vit(paca_vit.PACA_VIT_SMALL),
    "pacavit_small_p2cmlp_100_0": vit(paca_vit.PACA_VIT_SMALL_MLP),
    "pacavit_small_p2cconv_100_blockwise": vit(paca_vit.PACA_VIT_SMALL_BLOCKWISE),
    "pacavit_small_p2cconv_100": vit(paca_vit.PACA_VIT_SMALL_100_100),
    "pacavit_small_p2cconv_100_49": vit(paca_vit.PACA_VIT_SMALL_100_49),
    "pacavit_small_p2cconv_49_100": vit(paca_vit.PACA_VIT_SMALL_49_100),
    "pacavit_small_p2cconv_49_0": vit(paca_vit.PACA_VIT_SMALL_49_0),
    "pacavit_small_p2cconv_2_0": vit(paca_vit.PACA_VIT_SMALL_2_0),
    "pacavit_base_p2cconv_100_0": vit(paca_vit.PACA_VIT_BASE),
    "tcformer_light": tcformer(TCFormerClassifier, TCFORMER_LIGHT, num_classes=1000),
    "tcformer": tcformer(TCFormerClassifier, TCFORMER_BASE, num_classes=1000),
    "tcformer_large": tcformer(TCFormerClassifier, TCFORMER_LARGE, num_classes=1000),
    "tcformer_pose_mta_wholebody": tcformer(TCFormerKeypoints, TCFORMER_BASE, num_keypoints=133),
    "tcformer_large_pose_mta_wholebody": tcformer(TCFormerKeypoints, TCFORMER_LARGE, num_keypoints=133),
}
KEYS = "reference/tcformer_and_paca_vit/official_keys"


def published(path: Path) -> dict[str, Tensor]:
    """Tensors without numbers, under the names and with the shapes and types of an official checkpoint."""
    described = json.loads(path.read_text())["state_dict"]
    types = {"float32": torch.float32, "int64": torch.int64}
    return {
        name: torch.empty(value["shape"], dtype=types[value["dtype"]], device="meta")
        for name, value in described.items()
    }


def load(model: nn.Module, state: dict[str, Tensor], renames: Renames) -> None:
    load_official(model, flatten_skips(state), renames)


def test_every_published_checkpoint_is_tried(shared_file: Callable[[str], Path]) -> None:
    assert {path.stem for path in shared_file(KEYS).glob("*.json")} == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_of_the_published_checkpoints_fit(name: str, shared_file: Callable[[str], Path]) -> None:
    build, renames = CASES[name]
    state = published(shared_file(f"{KEYS}/{name}.json"))
    with torch.device("meta"):
        model = build()
    load(model, state, renames)
    assert len(state) == len(model.state_dict())


@pytest.mark.parametrize(
    "name", [name for name in CASES if "light" in name or "tiny" in name or name == "tcformer_pose_mta_wholebody"]
)
def test_every_number_of_a_checkpoint_arrives(name: str, shared_file: Callable[[str], Path]) -> None:
    build, renames = CASES[name]
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.rand(value.shape, generator=generator).to(value.dtype)
        for key, value in published(shared_file(f"{KEYS}/{name}.json")).items()
    }
    with torch.device("meta"):
        model = build()
    model = model.to_empty(device="cpu")
    load(model, state, renames)

    def prints(tensors: dict[str, Tensor]) -> list[tuple[int, float]]:
        return sorted((tensor.numel(), tensor.sum(dtype=torch.float64).item()) for tensor in tensors.values())

    assert prints(model.state_dict()) == prints(state)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_checkpoint_of_other_depth_is_refused_by_name(prefix: str, shared_file: Callable[[str], Path]) -> None:
    name = "tcformer_pose_mta_wholebody" if prefix else "tcformer"
    build, _ = CASES["tcformer_large_pose_mta_wholebody" if prefix else "tcformer_light"]
    with torch.device("meta"):
        model = build()
    fault = r"missing backbone\.stages\.1\.blocks\.4" if prefix else r"unexpected block1\.2\.norm1\.weight"
    with pytest.raises(ValueError, match=fault):
        load_tcformer(model, published(shared_file(f"{KEYS}/{name}.json")))


def test_skips_of_mlps_become_vectors_and_those_of_merges_matrices() -> None:
    state = {
        "block2.0.mlp.dwconv.skip.weight": torch.arange(3.0).reshape(3, 1, 1),
        "ctm1.conv.skip.weight": torch.arange(6.0).reshape(3, 2, 1),
        "ctm1.conv.weight": torch.zeros(3, 2, 3, 3),
    }
    flat = flatten_skips(state)
    torch.testing.assert_close(flat["block2.0.mlp.dwconv.skip.weight"], torch.arange(3.0), atol=0, rtol=0)
    torch.testing.assert_close(flat["ctm1.conv.skip.weight"], torch.arange(6.0).reshape(3, 2), atol=0, rtol=0)
    assert flat["ctm1.conv.weight"].shape == (3, 2, 3, 3)


@pytest.mark.parametrize("wrapper", [None, *WRAPPERS])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_in_their_wrapping(wrapper: str | None, prefix: str) -> None:
    state = {f"{prefix}head.weight": torch.ones(2)}
    checkpoint: dict[str, object] = {wrapper: state, "epoch": 3} if wrapper else dict(state)
    found = official_state(checkpoint)
    assert list(found) == ["head.weight"]
    torch.testing.assert_close(found["head.weight"], torch.ones(2), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"model": torch.ones(1)}, "holds a Tensor as its weights"),
        ({"epoch": 3, "optimizer": {}}, "holds a int under epoch"),
    ],
)
def test_a_file_without_weights_is_refused(checkpoint: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        official_state(checkpoint)
