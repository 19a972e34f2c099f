"""Conversion of published checkpoints, up to an answer of the service."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

import export.__main__ as command
from export.bundles import CARD, write_bundle
from export.convert import Wishes, convert, read_labels, read_settings
from export.published import PUBLISHED, DataSet
from export.source import WEIGHTS, Source, read_source
from models import BUILDERS
from models.checkpoints import paca_vit_renames
from models.thc import Thc
from service.bundle import Conversion, hash_file, open_bundle
from tests.export.conftest import ARCHITECTURE, CONFIG, quiet_exporter, write_quietly
from tests.export.conversions import ask, encode, make_picture, save
from tests.export.official_names import official_state
from tests.models import test_checkpoints_thc as thc

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SPEC of TCFormer and PaCa-ViT, section 8
OFFICIAL = "pacavit_of_tests"
SIDE, RESIZED = 16, 18
NUM_CLASSES = 5


@pytest.fixture(scope="module", autouse=True)
def _publication(_builder: None) -> Iterator[None]:
    """A published configuration that is small enough to export in a second."""
    data = DataSet(name="tests", title="Data of the tests", license="none", num_classes=NUM_CLASSES)
    size = {"height": SIDE, "width": SIDE, "resize_shorter_side": RESIZED}
    renames = paca_vit_renames("conv", num_stages=len(CONFIG.dims))
    published = PUBLISHED["paca-vit-tiny"]
    publication = replace(published, official=OFFICIAL, data=data, renames=renames, spec={**published.spec, **size})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED, ARCHITECTURE, publication)
        yield


def make_state(builder: str = ARCHITECTURE, num_classes: int = NUM_CLASSES) -> dict[str, Tensor]:
    """Random weights, all of which matter, by their official names; float16 does not hold them."""
    torch.manual_seed(0)
    model = BUILDERS[builder](num_classes=num_classes)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.5 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1
            weight.add_(spread * torch.randn_like(weight))
    return {name: tensor.clone() for name, tensor in official_state(model).items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path, make_state())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, _publication: None) -> Path:
    """The bundle made of a checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("converted")
    source, model, out = convert(ARCHITECTURE, save(folder, make_state()), folder / "paca-official", Wishes())
    write_quietly(source, model, folder)
    return out


def to_official_input(picture: Image.Image, *, size: int, resized: int) -> Tensor:
    """Resize the shorter side, cut out the middle, normalise: as the publishers do, step by step."""
    scale = resized / min(picture.size)
    picture = picture.resize([round(extent * scale) for extent in picture.size], Image.Resampling.BICUBIC)
    left, top = ((extent - size) // 2 for extent in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / STD).float().permute(2, 0, 1)[None]  # (1, 3, Y, X)


@pytest.mark.anyio
async def test_the_service_answers_with_the_official_preprocessing(converted: Path, tmp_path: Path) -> None:
    picture = make_picture(36, 27)
    answer = await ask(converted, tmp_path, encode(picture), top_k=NUM_CLASSES)
    scores = {one["label"]: one["score"] for one in answer["predictions"]}
    found = torch.tensor([scores[f"class_{index}"] for index in range(NUM_CLASSES)])
    _, model = read_source(converted)
    with torch.inference_mode():
        expected = model(to_official_input(picture, size=SIDE, resized=RESIZED))[0].softmax(dim=1)[0]
        unscaled = model(to_official_input(picture, size=SIDE, resized=SIDE))[0].softmax(dim=1)[0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # resizing before cutting rounds pixels twice
    assert (found - unscaled).abs().max() > 5e-3, "without the published scale the answer is another one"


def test_the_bundle_holds_the_published_numbers_as_they_are(converted: Path) -> None:
    stored, published = load_file(converted / WEIGHTS), make_state()
    assert len(stored) == len(published)
    sums = sorted(tensor.double().sum().item() for tensor in published.values())
    assert sorted(tensor.double().sum().item() for tensor in stored.values()) == sums
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    head = stored["head.weight"]
    torch.testing.assert_close(head, published["head.weight"], atol=0, rtol=0)
    assert not torch.equal(head.half().float(), head), "float16 would have changed them"


def test_manifest_and_card_tell_what_is_known_and_no_more(converted: Path) -> None:
    manifest = open_bundle(converted).manifest
    assert isinstance(manifest.origin, Conversion)
    assert manifest.origin.sha256 == hash_file(converted.parent / "official.pth")
    assert manifest.origin.command == f"python -m export convert {ARCHITECTURE} official.pth"
    assert (manifest.name, manifest.default, manifest.quality) == ("paca-official", False, {})
    assert manifest.normalisation.mean == MEAN
    assert manifest.normalisation.std == STD
    assert manifest.spec["interpolation"] == "bicubic"
    card = (converted / CARD).read_text()
    for told in (
        "converted, not trained here",
        "`official.pth`",
        manifest.origin.sha256,
        f"`{OFFICIAL}` of github.com/iVMCL/PaCaViT",
        "not known here; the official code is MIT",
        "Not measured here.",
        "numbered, as no file of names was given",
    ):
        assert told in card, told
    for untold in ("Seed", "minutes", "Recipe", "| split |", str(converted.parent)):
        assert untold not in card, untold


def test_a_converted_bundle_can_be_made_again_from_itself(converted: Path, tmp_path: Path) -> None:
    source, model = read_source(converted)
    with quiet_exporter():
        manifest = write_bundle(source, model, tmp_path / source.name)
    old = open_bundle(converted).manifest
    assert manifest.model_dump(exclude={"files"}) == old.model_dump(exclude={"files"})
    assert manifest.files[WEIGHTS] == old.files[WEIGHTS]


def test_the_user_s_wishes_reach_the_facts(checkpoint: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("tench\ncrane\ngoldfish, Carassius auratus\ncrane\nélan\n", encoding="utf-8")
    settings = read_settings(["interpolation=bilinear", "resize_shorter_side=20", "mean=[0.5, 0.5, 0.5]"])
    wishes = Wishes(labels=labels, license="CC-BY-4.0", settings=settings)
    source, model, out = convert(OFFICIAL, checkpoint, None, wishes)
    assert out == Path("bundles/paca-vit-of-tests-tests")
    assert source.name == out.name
    assert source.spec["labels"] == ["tench", "crane", "goldfish, Carassius auratus", "crane", "élan"]
    assert (source.spec["interpolation"], source.spec["resize_shorter_side"]) == ("bilinear", 20)
    assert source.normalisation.mean == (0.5, 0.5, 0.5)
    assert source.normalisation.std == STD
    assert "CC-BY-4.0, as stated by whoever converted the checkpoint; not checked here" in source.license
    assert "differs from the published: interpolation, mean, resize_shorter_side" in source.limits
    assert "--labels labels.txt" in source.origin.command
    assert "--set resize_shorter_side=20" in source.origin.command
    assert not model.training


def test_a_checkpoint_of_another_configuration_is_refused_by_a_few_names(tmp_path: Path) -> None:
    path = save(tmp_path, make_state())
    with pytest.raises(ValueError, match="has 5 classes, the published one has 1000") as caught:
        convert("paca-vit-tiny", path, None, Wishes())
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(ValueError, match="does not fit PaCaViTClassifier") as caught:
        convert("paca-vit-tiny", path, None, Wishes(labels=labels))
    message = str(caught.value)
    assert "missing backbone.stages.1.blocks.0.attention.clustering.conv.weight" in message
    assert "backbone.stages.0.downsample.norm.weight has shape (16,), expected (96,)" in message
    assert "more like it" in message
    assert len(message) < 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, r"missing head\.bias"),
        ({"stage1.0.attn.q.weight": None}, r"missing backbone\.stages\.0\.blocks\.0\.attention\.q\.weight"),
        ({"neck.conv.weight": torch.zeros(1)}, r"unexpected neck\.conv\.weight"),
        ({"norm2.weight": torch.zeros(7)}, r"norm\.weight has shape \(7,\), expected \(32,\)"),
        ({"head.bias": torch.full((5,), torch.nan)}, r"no finite numbers, for head\.bias"),
        ({"keypoint_head.final_layer.weight": torch.zeros(1)}, r"holds keypoint_head.*needs a task for keypoint"),
    ],
    ids=["no head", "a block's weight", "a stray", "another shape", "not a number", "a pose model"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state = {name: tensor for name, tensor in (make_state() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert(ARCHITECTURE, save(tmp_path, state), None, Wishes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\nc\nd\n", r"labels\.txt names 4; "),
        (b"a\nb\n\nd\ne\n", r"labels\.txt has no name in line 3"),
        (b"", r"labels\.txt has no name in line 1"),
        (b"a\nb\nc\nd\n\xff\n", r"labels\.txt is no UTF-8 text"),
    ],
    ids=["too few", "an empty line", "empty", "no text"],
)
def test_labels_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path, content: bytes, message: str) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert(ARCHITECTURE, checkpoint, None, Wishes(labels=labels))


def test_lines_may_end_as_they_do_on_windows(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_bytes(b"red fox\r\nblue whale\r\n\r\n")
    assert read_labels(labels) == ["red fox", "blue whale"]


@pytest.mark.parametrize("setting", ["resize_shorter_side=10", "colour=red", "std=[0.1, 0.1]", "interpolation=nearest"])
def test_settings_that_the_task_does_not_take_are_refused(checkpoint: Path, setting: str) -> None:
    with pytest.raises(ValidationError, match=setting.partition("=")[0]):
        convert(ARCHITECTURE, checkpoint, None, Wishes(settings=read_settings([setting])))


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="bilinear is no setting; write NAME=VALUE"):
        read_settings(["bilinear"])


@pytest.mark.parametrize("name", ["Paca", "paca_vit", "-paca", "paca vit"])
def test_a_name_that_no_bundle_may_have_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="small letters, digits and hyphens"):
        convert(ARCHITECTURE, tmp_path / "absent.pth", tmp_path / name, Wishes())


def test_a_folder_that_exists_is_left_as_it_is(converted: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in converted.iterdir()}
    with pytest.raises(ValueError, match="paca-official exists; name another folder with --out, or remove this one"):
        convert(ARCHITECTURE, tmp_path / "absent.pth", converted, Wishes())
    assert {path.name: path.stat().st_mtime_ns for path in converted.iterdir()} == before


def test_batches_of_no_pictures_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="max_batch=0; it is at least 1"):
        convert(ARCHITECTURE, checkpoint, None, Wishes(max_batch=0))


def test_a_classifier_of_brain_networks_becomes_a_bundle_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(thc.CONFIG, scope="subject")
    regions = [f"region_{index}" for index in range(config.num_regions)]
    published = PUBLISHED["thc-cc200-flat"]
    spec = {**published.spec, "regions": regions, "num_communities": config.sizes}
    monkeypatch.setitem(BUILDERS, "thc-of-tests", partial(Thc, config))
    monkeypatch.setitem(PUBLISHED, "thc-of-tests", replace(published, official="thc_of_tests", spec=spec))
    trained = thc.make(config)
    path = save(tmp_path, thc.official(trained) | thc.aliases(thc.official(trained)))
    settings = read_settings(["atlas=eight parts"])
    source, model, out = convert("thc-of-tests", path, tmp_path / "thc-tests", Wishes(settings=settings))
    for name, weight in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=0, rtol=0)
    manifest = open_bundle(write_quietly(source, model, tmp_path)).manifest
    assert manifest.spec["atlas"] == "eight parts"
    assert [tensor.shape for tensor in manifest.inputs] == [("batch", 8, 8)]
    assert "each subject's communities from that subject alone" in (out / CARD).read_text()


def test_a_model_whose_task_the_service_lacks_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, ARCHITECTURE, replace(PUBLISHED[ARCHITECTURE], task="pose-estimation"))
    with pytest.raises(ValueError, match=r"needs the task pose-estimation; known are .*image-classification"):
        convert(ARCHITECTURE, checkpoint, None, Wishes())


def run_command(monkeypatch: pytest.MonkeyPatch, bundle: Path, *arguments: str) -> list[tuple[Source, Path]]:
    """Run the command; gives what it wanted to write and where, in place of writing."""
    written: list[tuple[Source, Path]] = []

    def write(source: Source, model: Any, out: Path) -> Any:
        written.append((source, out))
        out.mkdir()
        return open_bundle(bundle).manifest

    monkeypatch.setattr(command, "write_bundle", write)
    monkeypatch.setattr("sys.argv", ["export", "convert", *arguments])
    command.main()
    return written


def test_the_command_converts_as_it_is_told(
    converted: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\n")
    options = ["--labels", str(labels), "--license", "CC-BY-4.0", "--set", "resize_shorter_side=20"]
    options += ["--set", "std=[1, 1, 1]", "--max-batch", "3", "--out", str(tmp_path / "made")]
    ((source, out),) = run_command(monkeypatch, converted, ARCHITECTURE, str(checkpoint), *options)
    assert out == tmp_path / "made"
    assert source.name == "made"
    assert source.max_batch == 3
    assert source.spec["labels"] == ["a", "b", "c", "d", "e"]
    assert source.spec["resize_shorter_side"] == 20
    assert source.normalisation.std == (1, 1, 1)
    assert source.license.startswith("CC-BY-4.0")
    assert json.loads(capsys.readouterr().out)["bundle"] == str(out)


def test_the_command_takes_the_weights_that_are_asked_for(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "official.pth"
    torch.save({"state_dict": {}, "averages": make_state()}, path)
    options = [ARCHITECTURE, str(path), "--out", str(tmp_path / "made")]
    with pytest.raises(SystemExit, match=r"python -m export convert: checkpoint does not fit .*missing"):
        run_command(monkeypatch, converted, *options)
    ((source, _),) = run_command(monkeypatch, converted, *options, "--key", "averages")
    assert "--key averages" in source.origin.command


@pytest.mark.anyio
async def test_a_checkpoint_with_every_published_name_is_served(
    tmp_path: Path, shared_file: Callable[[str], Path]
) -> None:
    keys = shared_file("reference/tcformer_and_paca_vit/official_keys/pacavit_tiny_p2cconv_100_0.json")
    shapes = {name: value["shape"] for name, value in json.loads(keys.read_text())["state_dict"].items()}
    given = make_state("paca-vit-tiny", 1000)
    state = {name: given[name].reshape(shape) for name, shape in shapes.items()}
    settings = {"height": 64, "width": 64, "resize_shorter_side": 71}  # 12 times less work than 224
    wishes = Wishes(settings=settings, max_batch=1)
    out = tmp_path / "paca-vit-tiny-imagenet1k"
    source, model, out = convert("pacavit_tiny_p2cconv_100_0", save(tmp_path, state), out, wishes)
    write_quietly(source, model, tmp_path)
    picture = make_picture(142, 71)
    answer = await ask(out, tmp_path / "cache", encode(picture), top_k=1000)
    with torch.inference_mode():
        expected = model(to_official_input(picture, size=64, resized=71))[0].softmax(dim=1)[0]
    scores = {one["index"]: one["score"] for one in answer["predictions"]}
    # The picture's shorter side has the right length, so that nothing is resized; the rest is float32 in another order.
    torch.testing.assert_close(torch.tensor([scores[i] for i in range(1000)]), expected, atol=1e-6, rtol=1e-3)
