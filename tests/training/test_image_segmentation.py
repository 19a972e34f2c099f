"""Scenes so small that a whole run takes seconds: a red and a blue half, with a stripe of void between them."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from models import BUILDERS
from models.paca_seg import PaCaFpnSegmenter
from models.semantic_fpn import SemanticFpnConfig
from tests.training.conftest import TINY
from training import image_segmentation, loop
from training.augmentation import Augmentation
from training.image_segmentation import ImageSegmentation, Scenes, resize_logits, weigh_classes
from training.loop import train
from training.recipe import Recipe

SIZE = (16, 24)
VOID = 2
CPU = torch.device("cpu")


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    border = int(rng.integers(6, 18))
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[:, border:] = 1
    pixels = rng.integers(0, 100, (*SIZE, 3), dtype=np.uint8)
    pixels[mask == 0, 0] += 120
    pixels[mask == 1, 2] += 120
    mask[:, border - 1 : border + 1] = VOID
    return pixels, mask


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5), ("test", 6)):
        pairs = [make_scene(rng) for _ in range(count)]
        columns = {"image": [encode(pixels) for pixels, _ in pairs], "mask": [encode(mask) for _, mask in pairs]}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def problem() -> ImageSegmentation:
    return ImageSegmentation(
        labels=("red", "blue"),
        train_file="train.parquet",
        valid_file="val.parquet",
        test_file="test.parquet",
        size=SIZE,
        max_pixels=1_000_000,
        mean=(0.5, 0.2, 0.4),
        std=(0.25, 0.25, 0.25),
        crops=((0.5, (8, 12)), (1.0, SIZE)),
        scales=(0.7, 1.5),
        jitter=Augmentation(brightness=0.1, contrast=0.1, saturation=0.1),
    )


@pytest.fixture
def segmenter_recipe(recipe: Recipe, problem: ImageSegmentation, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    head = SemanticFpnConfig(pyramid_dim=16, dim=16)
    monkeypatch.setitem(BUILDERS, "tiny-segmenter", partial(PaCaFpnSegmenter, TINY, head=head))
    return replace(recipe, name="tiny-scenes", model="tiny-segmenter", problem=problem, batch_size=4, ema_decay=0.9)


class Oracle(nn.Module):
    """Tells red from blue by the pixels, at an eighth of the size and with a liking for red: wrong at borders."""

    def __init__(self, problem: ImageSegmentation) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(problem.mean)[:, None, None])
        self.std = nn.Parameter(torch.tensor(problem.std)[:, None, None])
        self.inputs: list[Tensor] = []

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.inputs.append(image)
        red, _, blue = (image * self.std + self.mean).unbind(dim=1)
        return F.avg_pool2d(torch.stack([red + 0.3, blue], dim=1), 8), []


def test_splits_are_read_as_they_were_written(problem: ImageSegmentation, scenes: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("valid", 5), ("test_dev", 6)):
        examples = problem.read(scenes, split)
        assert len(examples) == count
        for image, mask in zip(examples.images.numpy(), examples.masks.numpy(), strict=True):
            pixels, truth = make_scene(rng)
            np.testing.assert_array_equal(image, pixels)
            np.testing.assert_array_equal(mask, truth)


def test_rare_classes_weigh_more_and_void_does_not_count() -> None:
    masks = torch.tensor([[[0, 0, 0, 1], [2, 2, 2, 2]]], dtype=torch.uint8)
    expected = 1 / np.log(1.1 + np.array([0.75, 0.25]))
    torch.testing.assert_close(weigh_classes(masks, num_classes=2), torch.from_numpy(expected).float())


def test_crops_grow_during_the_run_and_around_the_picture_is_the_mean_colour(
    problem: ImageSegmentation, scenes: Path
) -> None:
    model = Oracle(problem)
    far = replace(problem, scales=(0.25, 0.25), jitter=Augmentation())
    examples = far.load(scenes)
    rows, rng = torch.arange(4), Generator().manual_seed(0)
    for progress in (0.0, 0.49, 0.5, 0.99):
        assert far.loss(model, examples, rows, progress=progress, rng=rng).isfinite()
    assert [image.shape[2:] for image in model.inputs] == [(8, 12), (8, 12), SIZE, SIZE]
    # A quarter as large, 4x6 pixels of the crop show the picture, and at most one more row or column its edge.
    is_mean = (model.inputs[2].abs() < 1e-5).all(dim=1)
    assert (is_mean.sum(dim=(1, 2)) >= 16 * 24 - 5 * 7).all()
    assert (is_mean.sum(dim=(1, 2)) <= 16 * 24 - 4 * 6).all()


def test_the_loss_is_the_weighted_cross_entropy_of_every_second_pixel_that_is_not_void(
    problem: ImageSegmentation,
) -> None:
    plain = replace(problem, scales=(1.0, 1.0), jitter=Augmentation(), crops=((1.0, SIZE),))
    rng = np.random.default_rng(1)
    # Classes in blocks of 2x2 pixels, so that it does not matter which of them is looked at.
    small = torch.from_numpy(rng.integers(0, 3, (2, 8, 12), dtype=np.uint8))
    masks = small.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    images = torch.from_numpy(rng.integers(0, 256, (2, *SIZE, 3), dtype=np.uint8))
    weights = torch.tensor([1.0, 3.0])
    model = Oracle(plain)
    found = plain.loss(
        model, Scenes(images, masks, weights), torch.arange(2), progress=0.0, rng=Generator().manual_seed(3)
    )
    # Crops of the picture's own size may be mirrored, and nothing else.
    whole = plain.normalise(images.permute(0, 3, 1, 2).float() / 255)
    total = weight_sum = 0.0
    for crop, image, mask in zip(model.inputs[0], whole, small.long(), strict=True):
        is_mirrored = (crop - image.flip(-1)).abs().max() < 1e-4
        assert is_mirrored or (crop - image).abs().max() < 1e-4
        truth = mask.flip(-1) if is_mirrored else mask
        log_probs = resize_logits(model(crop[None])[0].detach(), (8, 12))[0].log_softmax(dim=0)
        for row in range(8):
            for column in range(12):
                label = int(truth[row, column])
                if label != VOID:
                    total -= float(weights[label] * log_probs[label, row, column])
                    weight_sum += float(weights[label])
    assert found.item() == pytest.approx(total / weight_sum, rel=1e-4)


def test_whole_pictures_are_measured_at_their_own_size(problem: ImageSegmentation, scenes: Path) -> None:
    found = problem.evaluate(Oracle(problem).eval(), scenes, "test_dev")
    assert next(iter(found)) == "mean_iou"
    hits = wrong = 0
    ious: dict[int, list[int]] = {0: [0, 0], 1: [0, 0]}
    examples = problem.read(scenes, "test_dev")
    for image, mask in zip(examples.images, examples.masks, strict=True):
        logits = Oracle(problem)(problem.normalise(image.permute(2, 0, 1)[None].float() / 255))[0]
        predicted = resize_logits(logits, SIZE).argmax(dim=1)[0]
        for p, t in zip(predicted.flatten().tolist(), mask.flatten().tolist(), strict=True):
            if t != VOID:
                hits, wrong = hits + (p == t), wrong + (p != t)
                for label, counts in ious.items():
                    counts[0] += p == t == label
                    counts[1] += label in (p, t)
    assert wrong > 0
    assert found["pixel_accuracy"] == pytest.approx(hits / (hits + wrong))
    assert found["iou_red"] == pytest.approx(ious[0][0] / ious[0][1])
    assert found["iou_blue"] == pytest.approx(ious[1][0] / ious[1][1])
    assert found["mean_iou"] == pytest.approx((found["iou_red"] + found["iou_blue"]) / 2)


def test_the_measure_does_not_depend_on_the_batch(
    problem: ImageSegmentation, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = PaCaFpnSegmenter(TINY, num_classes=2, head=SemanticFpnConfig(pyramid_dim=16, dim=16)).eval()
    together = problem.evaluate(model, scenes, "valid")
    monkeypatch.setattr(image_segmentation, "EVALUATION_BATCH", 1)
    assert problem.evaluate(model, scenes, "valid") == together


def test_a_short_run_learns_the_two_halves(
    segmenter_recipe: Recipe, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_STEPS", 8)
    recipe = replace(segmenter_recipe, epochs=12)
    model, _ = train(recipe, data=scenes, work=tmp_path, device=CPU)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0] / 2
    assert recipe.problem.evaluate(model, scenes, "test_dev")["mean_iou"] > 0.8


def test_batch_norms_of_the_averaged_weights_get_statistics_of_their_own(
    segmenter_recipe: Recipe, scenes: Path, tmp_path: Path
) -> None:
    recipe = replace(segmenter_recipe, epochs=1, batch_size=16, ema_decay=0.9)
    run = loop.Run(recipe, recipe.problem.load(scenes), device=CPU, start_weights=None)
    run.advance()
    model = run.finish()
    assert not any(module.training for module in model.modules())
    rng = Generator()
    rng.set_state(run.rng.get_state())
    # One batch makes up an epoch here, so the statistics are those of the batch that `finish` drew.
    again = loop.Run(recipe, recipe.problem.load(scenes), device=CPU, start_weights=None)
    again.advance()
    norm = model.head.levels[0].convs[0].norm
    seen: list[Tensor] = []
    again.average.module.head.levels[0].convs[0].norm.register_forward_hook(
        lambda _m, inputs, _o: seen.append(inputs[0])
    )
    again.finish()
    mean = seen[0].float().mean(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-3, rtol=1e-2)
    assert norm.momentum == 0.1
    assert (norm.running_mean - run.model.head.levels[0].convs[0].norm.running_mean).abs().max() > 1e-3


def test_a_schedule_that_ends_early_is_refused(problem: ImageSegmentation) -> None:
    with pytest.raises(ValueError, match="must end with a share of 1"):
        replace(problem, crops=((0.9, SIZE),))
