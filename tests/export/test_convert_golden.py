"""Checkpoints of every family, with weights that the official code was run with, up to an answer of the service.

The golden files hold small models under their official names, and what the official code gave for a picture.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from export.convert import Wishes, convert
from export.published import PUBLISHED, DataSet
from models import BUILDERS
from models.paca_seg import PaCaSegmenter
from models.paca_teacher import PaCaTeacherConfig, PaCaTeacherViTClassifier
from models.paca_vit import PaCaViTClassifier
from models.tcformer import TCFormerClassifier, TCFormerConfig
from service.bundle import open_bundle
from tests.export.conftest import write_quietly
from tests.export.conversions import ask, assert_mask, assert_scores, encode, make_picture, save
from tests.golden_files import golden_files
from tests.models import test_paca_seg as seg
from tests.models import test_paca_teacher as teacher
from tests.models import test_paca_vit as vit
from tests.models import test_tcformer_golden as tcformer

SYSTEM = "tcformer_and_paca_vit"
NAME = "published-of-tests"
TOLERANCE = 1e-5  # of max|a - b| / max|b|, the golden files' own


@dataclass(frozen=True, kw_only=True)
class Published:
    """A small model as the official code has it.

    Attributes:
        like: the variant whose conversion it takes over.
        build: our model of this size; takes `num_classes`.
        state: weights under their official names.
        image: (B, 3, Y, X).
        logits: that the official code gave.
    """

    like: str
    build: partial[nn.Module]
    state: dict[str, Tensor]
    image: Tensor
    logits: Tensor


def read(path: Path) -> Published:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored, official = load_file(path), json.loads(metadata["config"])
    state = {name.removeprefix("sd."): tensor for name, tensor in stored.items() if name.startswith("sd.")}
    logits = stored.get("in0.logits", stored.get("in0.seg_logits"))
    assert logits is not None
    if path.stem.startswith("tcformer"):
        like, build = "tcformer-light", partial(TCFormerClassifier, tcformer.config_from_official(official["backbone"]))
    elif path.stem.startswith("paca_teacher"):
        like, build = "paca-teacher-tiny", partial(PaCaTeacherViTClassifier, teacher.config_from_official(official))
    elif path.stem.startswith("paca_seg"):
        config = vit.config_from_official({name: value for name, value in official.items() if name != "out_indices"})
        head = seg.head_from_official(json.loads(metadata["seg_head"]), config)
        like, build = "paca-seg-tiny", partial(PaCaSegmenter, config, head_dim=head["head_dim"])
        heads = {name for name in stored if name.startswith("head.sd.")}
        state = {f"backbone.{name}": tensor for name, tensor in state.items()}
        state |= {name.replace("head.sd", "decode_head"): stored[name] for name in heads}
    else:
        like = "paca-vit-small-mlp" if path.stem.startswith("paca_mlp") else "paca-vit-tiny"
        build = partial(PaCaViTClassifier, vit.config_from_official(official))
    return Published(like=like, build=build, state=state, image=stored["in0.image"], logits=logits)


def shorten(published: Published) -> Published:
    """Leave the first block of each stage, and of TCFormer, which takes longest to export, two stages."""
    (config,) = published.build.args
    num_stages = 2 if isinstance(config, TCFormerConfig) else len(config.dims)
    depths = (1,) * num_stages
    if isinstance(config, PaCaTeacherConfig):
        config = replace(config, depths=depths, vit=replace(config.vit, depths=depths))
    elif isinstance(config, TCFormerConfig):
        first = {name: getattr(config, name)[:num_stages] for name in ("dims", "num_heads", "mlp_ratios")}
        ratios = {"reduction_ratios": config.reduction_ratios[:2], "sample_ratios": config.sample_ratios[:1]}
        config = replace(config, depths=depths, **first, **ratios)
    else:
        config = replace(config, depths=depths)
    state = {}
    for name, tensor in published.state.items():
        stage = re.match(r"(?:ctm|block|norm)(\d)", name)
        block = re.search(r"(?:stage|block)\d\.(\d+)\.", name)
        if not ((stage and int(stage[1]) > num_stages - name.startswith("ctm")) or (block and int(block[1]))):
            state[name] = tensor[:, : config.dims[-1]] if name == "head.weight" else tensor
    return replace(published, build=partial(published.build.func, config, **published.build.keywords), state=state)


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Published], None]:
    """Makes a small model one of those that the converter knows, as `NAME`."""

    def register(published: Published) -> None:
        rows, columns = published.image.shape[2:]
        model = PUBLISHED[published.like]
        spec: dict[str, Any] = {**model.spec, "height": rows, "width": columns}
        if "resize_shorter_side" in spec:
            spec["resize_shorter_side"] = max(rows, columns) * 9 // 8
        data = DataSet(name="tests", title="Numbers", license="none", num_classes=published.logits.shape[1])
        monkeypatch.setitem(BUILDERS, NAME, published.build)
        monkeypatch.setitem(PUBLISHED, NAME, replace(model, official="published_of_tests", data=data, spec=spec))

    return register


@pytest.mark.parametrize(
    "path",
    golden_files(SYSTEM, "paca_conv", "paca_mlp", "paca_teacher", "paca_seg", "tcformer_"),
    ids=lambda path: path.stem,
)
@pytest.mark.parametrize(("wrapper", "prefix"), [("model", ""), ("state_dict", "module.")])
def test_a_checkpoint_converts_to_a_model_that_gives_the_golden_logits_of_paca_and_tcformer(
    path: Path, wrapper: str, prefix: str, tmp_path: Path, publish: Callable[[Published], None]
) -> None:
    published = read(path)
    publish(published)
    checkpoint = save(tmp_path, published.state, wrapper=wrapper, prefix=prefix)
    _, model, _ = convert(NAME, checkpoint, tmp_path / "made", Wishes())
    with torch.inference_mode():
        found = model(published.image)[0]
    assert found.shape == published.logits.shape
    assert (found - published.logits).abs().max() <= TOLERANCE * published.logits.abs().max()


def served() -> list[Any]:
    """One file of each family that no other test serves; the weights of eps probes are too small to cluster by."""
    cases = []
    for prefix in ("paca_teacher", "paca_seg", "tcformer_"):
        files = [path for path in golden_files(SYSTEM, prefix) if "eps_probe" not in path.stem]
        mark = pytest.mark.skipif(not files, reason="needs golden files that are not part of the repository")
        cases.append(pytest.param(files[0] if files else None, marks=mark, id=files[0].stem if files else prefix))
    return cases


@pytest.mark.anyio
@pytest.mark.parametrize("path", served())
async def test_a_converted_model_proves_itself_and_answers_as_its_module(
    path: Path, tmp_path: Path, publish: Callable[[Published], None]
) -> None:
    published = shorten(read(path))
    publish(published)
    checkpoint = save(tmp_path, published.state)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"kind {index}\n" for index in range(published.logits.shape[1])))
    source, model, _ = convert(NAME, checkpoint, tmp_path / "bundles" / "converted", Wishes(labels=labels, max_batch=1))
    bundle = write_quietly(source, model, tmp_path / "bundles")
    manifest = open_bundle(bundle).manifest
    if manifest.task == "image-segmentation":
        rows, columns = published.image.shape[2:]
        body = encode(make_picture(2 * columns, 2 * rows))
        answer = await ask(bundle, tmp_path / "cache", body, task=manifest.task)
        assert_mask(answer, model, body, manifest)
    else:
        body = encode(make_picture(150, 110))
        answer = await ask(bundle, tmp_path / "cache", body, top_k=published.logits.shape[1])
        assert_scores(answer, model, body, manifest)
