"""Training and measuring image classifiers on parquet files of encoded pictures.

Pictures go through the service's own decoder, so that training, evaluation and serving see the same pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from service.tasks.pictures import PictureSpec, decode_picture
from training.augmentation import Augmentation, augment, cut_mix, resize

EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Pictures:
    """Decoded examples, on the CPU.

    Attributes:
        images: (N, Y, X, 3) uint8.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class ImageClassification:
    """A data set of labelled pictures and how it is shown to the model.

    Attributes:
        labels: names of the classes, in the order of the label's numbers.
        train_file: parquet with columns image, label, fold, relative to the data folder.
        test_file: parquet with columns image, label.
        picture: how the service decodes a picture.
        mean, std: per channel, of values in [0, 1].
        resolutions: (share of the run, side) in order: pictures have that side until that share is over.
        augmentation: strengths.
        label_smoothing: of the cross-entropy.
        cutmix_until: share of the run after which pictures are no longer mixed.
    """

    labels: tuple[str, ...]
    train_file: str
    test_file: str
    picture: PictureSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resolutions: tuple[tuple[float, int], ...]
    augmentation: Augmentation
    label_smoothing: float = 0.0
    cutmix_until: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a resolution schedule that does not reach the end of the run.

        Raises: ValueError.
        """
        if not self.resolutions or self.resolutions[-1][0] < 1.0:
            raise ValueError(f"resolutions={self.resolutions} must end with a share of 1.0")

    def describe(self, data: Path) -> dict[str, Any]:  # noqa: ARG002 - all is known without it
        """Tell the manifest how pictures become the model's input; see `Problem.describe`."""
        return {
            "task": "image-classification",
            "spec": self.picture.model_dump() | {"labels": self.labels},
            "normalisation": {"mean": self.mean, "std": self.std},
        }

    def load(self, data: Path) -> Pictures:
        """Decode the rows of the fold "train"."""
        return self.read(data, "train")

    def read(self, data: Path, split: str) -> Pictures:
        """Decode one split.

        Args:
            data: folder of all data sets.
            split: "train", "valid" or "test_dev".
        """
        if split == "test_dev":
            table = pq.read_table(data / self.test_file, columns=["image", "label"])
        else:
            table = pq.read_table(data / self.train_file, columns=["image", "label"], filters=[("fold", "=", split)])
        images = np.stack([decode_picture(row.as_py(), self.picture) for row in table["image"]])
        return Pictures(torch.from_numpy(images), torch.from_numpy(table["label"].to_numpy().astype(np.int64)))

    def normalise(self, images: Tensor) -> Tensor:
        """Bring pictures (B, 3, Y, X) in [0, 1] to the model's scale."""
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]

    def loss(self, model: nn.Module, examples: Pictures, rows: Tensor, *, progress: float, rng: Generator) -> Tensor:
        """Cross-entropy of an augmented batch at the resolution of this part of the run."""
        images = augment(_to_float(examples.images[rows], model), self.augmentation, rng)
        images = resize(images, next(side for share, side in self.resolutions if progress < share))
        images, kept = cut_mix(images, self.augmentation.cutmix if progress < self.cutmix_until else 0.0, rng)
        logits, _ = model(self.normalise(images))
        labels, kept = examples.labels[rows].to(logits.device), kept.to(logits.device)
        losses = [
            F.cross_entropy(logits.float(), part, label_smoothing=self.label_smoothing, reduction="none")
            for part in (labels, labels.roll(1))
        ]
        return (kept * losses[0] + (1.0 - kept) * losses[1]).mean()

    def evaluate(self, model: nn.Module, data: Path, split: str) -> dict[str, float]:
        """Top-1 accuracy and cross-entropy over a whole split."""
        examples = self.read(data, split)
        with torch.inference_mode():
            logits = torch.cat(
                [
                    model(self.normalise(_to_float(part, model)))[0].float().cpu()
                    for part in examples.images.split(EVALUATION_BATCH)
                ]
            )
        accuracy = (logits.argmax(dim=1) == examples.labels).float().mean().item()
        return {"accuracy": accuracy, "cross_entropy": F.cross_entropy(logits, examples.labels).item()}


def _to_float(images: Tensor, model: nn.Module) -> Tensor:
    """Move uint8 pictures (B, Y, X, 3) to the model's device: (B, 3, Y, X) in [0, 1]."""
    device = next(model.parameters()).device
    return images.to(device).permute(0, 3, 1, 2).float() / 255.0
