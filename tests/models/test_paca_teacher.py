import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoints import load_official
from models.checkpoints_tcformer import paca_teacher_renames
from models.paca_teacher import (
    PACA_TEACHER_BASE,
    PACA_TEACHER_SMALL,
    PACA_TEACHER_TINY,
    BlurDownsample,
    PaCaTeacherConfig,
    PaCaTeacherViTClassifier,
)
from models.paca_vit import PaCaViTConfig
from tests.golden_files import golden_files
from tests.models.golden_pictures import assert_stored_outputs, read_golden, read_metadata, taken
from tests.models.picture_laws import assert_gradients_reach_every_parameter, filled, pictures
from tests.models.test_paca_vit import config_from_official as vit_from_official
from tests.models.test_paca_vit import record

GOLDEN = golden_files("tcformer_and_paca_vit", "paca_teacher")

SMALL = PaCaTeacherConfig(
    vit=PaCaViTConfig(
        dims=(8, 16),
        num_heads=(2, 4),
        depths=(2, 1),
        mlp_ratios=(2, 2),
        num_clusters=(6, 3),
        clustering="teacher",
        clustering_kernel_sizes=(3, 3),
        onsite_clustering=(0, 0),
    ),
    dims=(8, 16),
    depths=(1, 1),
    kernel_size=3,
)


def config_from_official(official: Mapping[str, Any]) -> PaCaTeacherConfig:
    """The official arguments as our config; ValueError names an argument that ours has no place for."""
    teacher = official["paca_teacher_cfg"]
    for name, built in {
        "type": "PaCaTeacher_ConvMixer",
        "stem_cfg": None,
        "norm_cfg": {"type": "BN"},
        "act_cfg": {"type": "GELU"},
        "drop_path_rate": 0.0,
    }.items():
        if teacher[name] != built:
            raise ValueError(f"{name}={teacher[name]}; only {built} is built")
    vit = vit_from_official({name: value for name, value in official.items() if name != "paca_teacher_cfg"})
    dims = tuple(teacher["embed_dims"])
    return PaCaTeacherConfig(
        vit=replace(vit, clustering="teacher"),
        dims=dims,
        depths=tuple(teacher["depths"]),
        kernel_size=teacher["kernel_size"],
        adds_features=teacher["return_outs"] and dims == vit.dims,
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_outputs_of_paca_vit_with_a_teacher_are_reproduced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, stored = read_golden(path)
    official = json.loads(metadata["config"])
    config = config_from_official(official)
    model = PaCaTeacherViTClassifier(config, num_classes=official["num_classes"]).eval()
    renames = paca_teacher_renames(num_stages=len(config.dims))
    load_official(model, taken(stored, "sd."), renames)
    seen = record(model, monkeypatch)

    assert_stored_outputs(model, seen, stored, metadata, needed="logits")


@pytest.mark.skipif(not GOLDEN, reason="GOLDEN_ROOT holds no golden file of a teacher")
@pytest.mark.parametrize("change", [{"type": "PaCaTeacher_Other"}, {"stem_cfg": {}}, {"drop_path_rate": 0.1}])
def test_official_settings_that_are_not_built_are_refused(change: dict[str, object]) -> None:
    official = json.loads(read_metadata(GOLDEN[0])["config"])
    with pytest.raises(ValueError, match=next(iter(change))):
        config_from_official(official | {"paca_teacher_cfg": official["paca_teacher_cfg"] | change})


def small_model(config: PaCaTeacherConfig = SMALL) -> PaCaTeacherViTClassifier:
    torch.manual_seed(0)
    model = PaCaTeacherViTClassifier(config, num_classes=3).eval()
    filled(model)
    return model


@torch.no_grad()
def test_a_picture_gives_the_same_alone_and_in_a_batch() -> None:
    model = small_model()
    logits, clusters = model(pictures(32, 32))
    for i in range(2):
        logits_alone, clusters_alone = model(pictures(32, 32)[i : i + 1])
        torch.testing.assert_close(logits_alone[0], logits[i], atol=1e-6, rtol=1e-5)
        for together, alone in zip(clusters, clusters_alone, strict=True):
            torch.testing.assert_close(alone[0], together[i], atol=1e-7, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (49, 37)])
def test_assignments_are_distributions_over_patches_at_any_size(size: tuple[int, int]) -> None:
    model = small_model()
    logits, clusters = model(pictures(*size))
    torch.testing.assert_close(logits, model(pictures(*size))[0], atol=0, rtol=0)
    assert [assignment.shape[1] for assignment in clusters] == [6, 3]
    for assignment in clusters:
        torch.testing.assert_close(assignment.sum(dim=2), torch.ones(assignment.shape[:2]), atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter() -> None:
    model = small_model()
    model(pictures(32, 32))[0].square().sum().backward()
    # Softmax ignores what is added to all keys, or to all patches of a cluster.
    without_effect = ("attention.k.bias", *(f"to_clusters.{i}.bias" for i in range(2)))
    assert_gradients_reach_every_parameter(model, without_effect=without_effect)


@torch.no_grad()
def test_features_of_the_teacher_are_added_only_where_the_config_says_so() -> None:
    led, added = small_model(replace(SMALL, adds_features=False)), small_model()
    led.load_state_dict(added.state_dict())
    assert (led(pictures(32, 32))[0] - added(pictures(32, 32))[0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_stage_without_clusters_attends_to_all_patches() -> None:
    model = small_model(replace(SMALL, vit=replace(SMALL.vit, num_clusters=(6, 0))))
    assert [assignment.shape[1] for assignment in model(pictures(32, 32))[1]] == [6]


def test_the_blur_keeps_a_plain_map_and_halves_a_checkerboard() -> None:
    down = BlurDownsample(1, 1)
    kernel = down.get_buffer("blur")[0, 0]
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0), atol=0, rtol=0)
    board = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
    torch.testing.assert_close((kernel * board).sum(), torch.tensor(0.0), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit": replace(SMALL.vit, clustering="conv")}, "clustering=conv of the transformer must be teacher"),
        ({"depths": (1, 1, 1)}, "both need 2"),
        ({"dims": (4, 16), "adds_features": False}, "must begin with 8"),
        ({"dims": (8, 12)}, "adds_features needs the transformer's dims"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("config", "millions"),
    [(PACA_TEACHER_TINY, 12.48), (PACA_TEACHER_SMALL, 21.08), (PACA_TEACHER_BASE, 47.66)],
    ids=["tiny", "small", "base"],
)
def test_published_variants_have_the_measured_number_of_parameters(config: PaCaTeacherConfig, millions: float) -> None:
    with torch.device("meta"):
        model = PaCaTeacherViTClassifier(config, num_classes=1000)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions
