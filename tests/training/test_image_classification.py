import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from training.augmentation import Augmentation, cut_mix
from training.image_classification import ImageClassification, Pictures
from training.recipe import Recipe


class Colours(nn.Module):
    """Logits are how red and how blue a picture is; remembers the sizes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.sides: list[int] = []

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.sides.append(image.shape[-1])
        return self.scale * image.mean(dim=(2, 3))[:, [0, 2]], []


@pytest.fixture
def problem(recipe: Recipe) -> ImageClassification:
    assert isinstance(recipe.problem, ImageClassification)
    return recipe.problem


def test_each_split_has_its_own_rows(problem: ImageClassification, data: Path) -> None:
    assert len(problem.load(data)) == 32
    assert len(problem.read(data, "valid")) == 8
    assert len(problem.read(data, "test_dev")) == 8


def test_pictures_are_decoded_as_the_service_does(problem: ImageClassification, data: Path) -> None:
    examples = problem.read(data, "test_dev")
    table = pq.read_table(data / "test.parquet")
    expected = np.stack([np.asarray(Image.open(io.BytesIO(row.as_py()))) for row in table["image"]])
    torch.testing.assert_close(examples.images, torch.from_numpy(expected), atol=0, rtol=0)
    assert examples.labels.tolist() == table["label"].to_pylist()


def test_normalising_brings_pictures_to_the_scale_of_the_model(problem: ImageClassification) -> None:
    problem = replace(problem, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    expected = torch.tensor([0.9, 0.4, 0.175]).reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(problem.normalise(torch.ones(2, 3, 4, 4)), expected, atol=1e-6, rtol=0)


def test_pictures_grow_as_the_run_goes_on(problem: ImageClassification, data: Path) -> None:
    model, examples = Colours(), problem.load(data)
    for progress in (0.0, 0.49, 0.5, 0.99):
        problem.loss(model, examples, torch.arange(4), progress=progress, rng=Generator().manual_seed(0))
    assert model.sides == [8, 8, 12, 12]


def test_resolutions_that_end_before_the_run_are_refused(problem: ImageClassification) -> None:
    with pytest.raises(ValueError, match="resolutions"):
        replace(problem, resolutions=((0.5, 8), (0.9, 12)))


def test_the_loss_is_the_one_of_the_rows_that_were_asked_for(problem: ImageClassification, data: Path) -> None:
    examples = problem.load(data)
    blue = torch.arange(1, 32, 2)
    losses = [
        problem.loss(
            Colours(),
            Pictures(examples.images, torch.full_like(examples.labels, label)),
            blue,
            progress=0.0,
            rng=Generator().manual_seed(0),
        ).item()
        for label in (0, 1)
    ]
    assert losses[1] < losses[0]


def test_quality_is_measured_over_the_whole_split(
    problem: ImageClassification, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.image_classification.EVALUATION_BATCH", 3)
    assert problem.evaluate(Colours().eval(), data, "test_dev")["accuracy"] == 1.0
    worst = Colours().eval()
    nn.init.constant_(worst.scale, -1.0)
    quality = problem.evaluate(worst, data, "test_dev")
    assert quality["accuracy"] == 0.0
    assert quality["cross_entropy"] > np.log(2)


def test_mixed_pictures_count_for_both_labels_until_mixing_ends(problem: ImageClassification, data: Path) -> None:
    model, rows = Colours(), torch.arange(16)
    examples = problem.load(data)
    plain = replace(problem, augmentation=Augmentation(), resolutions=((1.0, 12),), label_smoothing=0.0)
    mixing = replace(plain, augmentation=Augmentation(cutmix=1.0), cutmix_until=0.5)

    def loss(of: ImageClassification, progress: float) -> Tensor:
        return of.loss(model, examples, rows, progress=progress, rng=Generator().manual_seed(3))

    torch.testing.assert_close(loss(mixing, 0.5), loss(plain, 0.5), atol=1e-6, rtol=0)

    images = examples.images[rows].permute(0, 3, 1, 2).float() / 255.0
    mixed, kept = cut_mix(images, 1.0, Generator().manual_seed(3))
    log_shares = model(mixing.normalise(mixed))[0].log_softmax(dim=1)
    labels = examples.labels[rows]
    each = [log_shares.gather(1, part[:, None])[:, 0] for part in (labels, labels.roll(1))]
    expected = -(kept * each[0] + (1 - kept) * each[1]).mean()
    torch.testing.assert_close(loss(mixing, 0.0), expected, atol=1e-6, rtol=0)
