"""Every published checkpoint, with random weights of its names, shapes and types, up to an answer of the service."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from export.convert import Wishes, convert
from export.published import PACA, PUBLISHED, TCFORMER, UNSERVED
from export.source import WEIGHTS, read_source
from service.bundle import open_bundle
from tests.export.conversions import ask, assert_mask, assert_scores, encode, fill_official, make_picture, save
from tests.golden_files import REPOSITORY

KEYS = "reference/tcformer_and_paca_vit/official_keys"
IMAGES = [publication.official for publication in PUBLISHED.values() if publication.publisher in (PACA, TCFORMER)]
MAX_PROGRAM = 0.1  # bytes of a program over those of the weights, which it does not hold again


def run_command(*arguments: str) -> None:
    command = [sys.executable, "-m", "export", "convert", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("official", IMAGES)
async def test_a_published_checkpoint_becomes_a_bundle_that_answers_as_its_module(
    official: str, tmp_path: Path, shared_file: Callable[[str], Path], samples: Path
) -> None:
    checkpoint = save(tmp_path, fill_official(shared_file(f"{KEYS}/{official}.json")), wrapper="model")
    bundle = tmp_path / "bundles" / "converted"
    run_command(official, str(checkpoint), "--max-batch", "1", "--out", str(bundle))
    manifest = open_bundle(bundle).manifest
    assert (bundle / manifest.programs["onnx"]).stat().st_size <= MAX_PROGRAM * (bundle / WEIGHTS).stat().st_size
    _, model = read_source(bundle)
    if manifest.task == "image-segmentation":
        body = encode(make_picture(700, 700))
        answer = await ask(bundle, tmp_path / "cache", body, task=manifest.task)
        assert_mask(answer, model, body, manifest)
    else:
        body = (samples / "photo_cat_cc0.jpg").read_bytes()
        answer = await ask(bundle, tmp_path / "cache", body, top_k=1000)
        assert_scores(answer, model, body, manifest)


@pytest.mark.parametrize(("official", "config"), list(zip(UNSERVED, ["tcformer-base", "tcformer-large"], strict=True)))
def test_a_published_pose_model_is_refused_under_another_name_too(
    official: str, config: str, tmp_path: Path, shared_file: Callable[[str], Path]
) -> None:
    names = json.loads(shared_file(f"{KEYS}/{official}.json").read_text())["state_dict"]
    checkpoint = save(tmp_path, {name: torch.zeros(1) for name in names})
    with pytest.raises(ValueError, match=r"holds keypoint_head\..*classifiers and models for segmentation can be conv"):
        convert(config, checkpoint, tmp_path / "made", Wishes())
    with pytest.raises(ValueError, match=r"needs a task for keypoint estimation.*one of paca-vit-tiny.* can be conv"):
        convert(official, checkpoint, tmp_path / "made", Wishes())


@pytest.mark.parametrize(
    ("official", "config"),
    [("tcformer_light", "tcformer-base"), ("pacavit_tiny_p2cconv_100_0", "paca-teacher-tiny")],
)
def test_a_published_checkpoint_of_another_configuration_is_refused_by_its_names(
    official: str, config: str, tmp_path: Path, shared_file: Callable[[str], Path]
) -> None:
    checkpoint = save(tmp_path, fill_official(shared_file(f"{KEYS}/{official}.json")))
    with pytest.raises(ValueError, match=r"does not fit \w+: .*missing \w+\..*and \d+ more like it"):
        convert(config, checkpoint, tmp_path / "made", Wishes())
