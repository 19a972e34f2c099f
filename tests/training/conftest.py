"""A data set, a model and a recipe so small that a whole run takes a second."""

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models import BUILDERS
from models.paca_vit import PaCaViTClassifier, PaCaViTConfig
from service.tasks.pictures import PictureSpec
from training.augmentation import Augmentation
from training.image_classification import ImageClassification
from training.optimizers import OptimizerConfig
from training.recipe import Facts, Recipe

TINY = PaCaViTConfig(
    dims=(8, 16),
    num_heads=(2, 2),
    depths=(2, 1),
    mlp_ratios=(2, 2),
    num_clusters=(4, 0),
    clustering_kernel_sizes=(3, 3),
    onsite_clustering=(0, 0),
    stem_strides=(1, 2),
)


def _rows(num: int, rng: np.random.Generator) -> dict[str, list[object]]:
    """Pictures with noise: red ones have label 0, blue ones label 1."""
    rows: dict[str, list[object]] = {"image": [], "label": []}
    for i in range(num):
        pixels = rng.integers(0, 120, (12, 12, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 100
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        rows["image"].append(file.getvalue())
        rows["label"].append(i % 2)
    return rows


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads on small tensors mostly wait for each other: minutes instead of seconds on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training file of two folds and a test file."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    pq.write_table(pa.table(_rows(40, rng) | {"fold": ["train"] * 32 + ["valid"] * 8}), folder / "train.parquet")
    pq.write_table(pa.table(_rows(8, rng)), folder / "test.parquet")
    return folder


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Eight steps of four epochs, everything that a recipe can ask for turned on."""
    monkeypatch.setitem(BUILDERS, "tiny", partial(PaCaViTClassifier, replace(TINY, drop_path=0.2)))
    return Recipe(
        name="tiny-colours",
        model="tiny",
        problem=ImageClassification(
            labels=("red", "blue"),
            train_file="train.parquet",
            test_file="test.parquet",
            picture=PictureSpec(
                height=12, width=12, resize_shorter_side=12, interpolation="bicubic", max_pixels=1_000_000
            ),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            resolutions=((0.5, 8), (1.0, 12)),
            augmentation=Augmentation(
                crop_padding=2, has_flip=True, brightness=0.1, contrast=0.1, saturation=0.1, cutout=3
            ),
            label_smoothing=0.1,
        ),
        epochs=4,
        batch_size=16,
        optimizer=OptimizerConfig(muon_lr=2e-2, adamw_lr=2e-2),
        facts=Facts(
            version="0.1.0",
            is_default=False,
            description="Tells red from blue.",
            limits="Knows two colours.",
            license="Apache-2.0",
            data="Made by the test.",
            data_license="Apache-2.0",
            max_body_bytes=1_000_000,
            max_batch=4,
        ),
        gradient_clip=5.0,
        ema_decay=0.5,
    )
