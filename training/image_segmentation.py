"""Training and measuring image segmentation on parquet files of encoded pictures and masks.

Pictures go through the service's own decoder, so that training, evaluation and serving see the same pixels.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from service.tasks.letterbox import LetterboxSpec, decode_letter
from training.augmentation import Augmentation, augment
from training.mean_iou import class_ious, count_confusions, mean_iou
from training.segmentation_augmentation import cut_masks, cut_pictures, draw_boxes

EVALUATION_BATCH = 4
LABEL_STRIDE = 2  # the loss looks at every second row and column of a crop: a quarter of its time, logits have stride 4


@dataclass(frozen=True)
class Scenes:
    """Decoded pictures with their masks, on the CPU.

    Attributes:
        images: (N, Y, X, 3) uint8.
        masks: (N, Y, X) uint8, class of each pixel.
        class_weights: (L,) float32, how much a pixel of each class counts in the loss.
    """

    images: Tensor
    masks: Tensor
    class_weights: Tensor

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.images)


@dataclass(frozen=True, kw_only=True)
class ImageSegmentation:
    """A data set of pictures, all of one size, whose pixels have classes, and how it is shown to the model.

    Attributes:
        labels: names of the classes, in the order of their numbers; the next number is void, which counts nowhere.
        train_file, valid_file, test_file: parquet with columns image and mask, relative to the data folder.
        size: (Y, X) of the pictures.
        max_pixels: of a picture that the service takes.
        mean, std: per channel, of values in [0, 1].
        crops: (share of the run, (Y, X)) in order: crops have that size until that share is over.
        scales: smallest and largest magnification of a crop.
        jitter: of colours.
    """

    labels: tuple[str, ...]
    train_file: str
    valid_file: str
    test_file: str
    size: tuple[int, int]
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crops: tuple[tuple[float, tuple[int, int]], ...]
    scales: tuple[float, float]
    jitter: Augmentation

    def __post_init__(self) -> None:
        """Refuse a schedule of crops that does not reach the end of the run.

        Raises: ValueError.
        """
        if not self.crops or self.crops[-1][0] < 1.0:
            raise ValueError(f"crops={self.crops} must end with a share of 1.0")

    @property
    def void(self) -> int:
        """The number of no class."""
        return len(self.labels)

    def describe(self, data: Path) -> dict[str, Any]:  # noqa: ARG002 - all is known without it
        """Tell the manifest how pictures become the model's input; see `Problem.describe`."""
        return {
            "task": "image-segmentation",
            "spec": self._letterbox.model_dump(mode="json") | {"labels": self.labels},
            "normalisation": {"mean": self.mean, "std": self.std},
        }

    def load(self, data: Path) -> Scenes:
        """Decode the training split."""
        return self.read(data, "train")

    def read(self, data: Path, split: str) -> Scenes:
        """Decode one split.

        Args:
            data: folder of all data sets.
            split: "train", "valid" or "test_dev".
        """
        file = {"train": self.train_file, "valid": self.valid_file, "test_dev": self.test_file}[split]
        table = pq.read_table(data / file, columns=["image", "mask"])
        images = np.stack([self._decode(row.as_py()) for row in table["image"]])
        masks = torch.from_numpy(np.stack([_decode_mask(row.as_py()) for row in table["mask"]]))
        return Scenes(torch.from_numpy(images), masks, weigh_classes(masks, num_classes=len(self.labels)))

    def normalise(self, images: Tensor) -> Tensor:
        """Bring pictures (B, 3, Y, X) in [0, 1] to the model's scale."""
        mean, std = images.new_tensor(self.mean), images.new_tensor(self.std)
        return (images - mean[:, None, None]) / std[:, None, None]

    def loss(self, model: nn.Module, examples: Scenes, rows: Tensor, *, progress: float, rng: Generator) -> Tensor:
        """Weighted cross-entropy, pixel by pixel, of crops of the size of this part of the run."""
        crop = next(size for share, size in self.crops if progress < share)
        device = next(model.parameters()).device
        images = _to_float(examples.images[rows].to(device))
        mean = images.new_tensor(self.mean)[:, None, None]
        boxes = draw_boxes(self.size, crop, self.scales, num=len(rows), rng=rng)
        # Around the picture is the mean colour, as in the service's input.
        images = augment(cut_pictures(images - mean, boxes, crop) + mean, self.jitter, rng)
        size = (crop[0] // LABEL_STRIDE, crop[1] // LABEL_STRIDE)
        labels = cut_masks(examples.masks[rows].to(device), boxes, size, void=self.void)
        logits = resize_logits(model(self.normalise(images))[0], size)
        weights = examples.class_weights.to(device)
        return F.cross_entropy(logits, labels, weight=weights, ignore_index=self.void)

    def evaluate(self, model: nn.Module, data: Path, split: str) -> dict[str, float]:
        """Mean intersection over union and that of each class, whole pictures at their own size, one scale."""
        examples = self.read(data, split)
        device = next(model.parameters()).device
        L = len(self.labels)
        confusions = torch.zeros(L, L, dtype=torch.int64)
        with torch.inference_mode():
            for images, masks in zip(
                examples.images.split(EVALUATION_BATCH), examples.masks.split(EVALUATION_BATCH), strict=True
            ):
                logits = model(self.normalise(_to_float(images.to(device))))[0]
                predicted = resize_logits(logits, self.size).argmax(dim=1).cpu()
                confusions += count_confusions(predicted, masks.long(), num_classes=L)
        ious = dict(zip(self.labels, class_ious(confusions).tolist(), strict=True))
        accuracy = (confusions.diagonal().sum() / confusions.sum()).item()
        return {"mean_iou": mean_iou(confusions), "pixel_accuracy": accuracy} | {
            f"iou_{label}": iou for label, iou in ious.items()
        }

    def _decode(self, body: bytes) -> np.ndarray:
        return decode_letter(body, self._letterbox).pixels

    @property
    def _letterbox(self) -> LetterboxSpec:
        red, green, blue = (round(255 * value) for value in self.mean)
        return LetterboxSpec(
            height=self.size[0], width=self.size[1], fill=(red, green, blue), max_pixels=self.max_pixels
        )


def weigh_classes(masks: Tensor, *, num_classes: int) -> Tensor:
    """Weigh rare classes more: 1 / log(1.1 + share of the pixels), void not counted.

    Args:
        masks: (N, Y, X) uint8.
        num_classes: L; other numbers are void.
    Returns: (L,) float32.
    Source: Paszke et al. 2016 (ENet), section 5.2. Differs: 1.1 instead of 1.02, so that weights differ by less.
    """
    counts = torch.bincount(masks.flatten(), minlength=num_classes)[:num_classes].float()
    return 1.0 / torch.log(1.1 + counts / counts.sum())


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring logits (B, L, Y, X) to the picture's size, bilinearly, in float32."""
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def _to_float(images: Tensor) -> Tensor:
    """Change uint8 pictures (B, Y, X, 3) to (B, 3, Y, X) in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255.0


def _decode_mask(body: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(body)) as picture:
        return np.asarray(picture)
