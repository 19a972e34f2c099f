"""Intersection over union of segmentations, over all pixels of a split together, as CamVid's results are published."""

import torch
from torch import Tensor


def count_confusions(predicted: Tensor, truth: Tensor, *, num_classes: int) -> Tensor:
    """Count which class was predicted where.

    Args:
        predicted: int64, any shape, each in [0, L).
        truth: int64, the same shape; pixels outside [0, L) are void and not counted.
        num_classes: L.
    Returns: (L, L) int64, pixels of true class (row) that got the predicted class (column).
    """
    is_real = (truth >= 0) & (truth < num_classes)
    pairs = truth[is_real] * num_classes + predicted[is_real]
    return torch.bincount(pairs, minlength=num_classes**2).unflatten(0, (num_classes, num_classes))


def class_ious(confusions: Tensor) -> Tensor:
    """Intersection over union of each class.

    Args:
        confusions: (L, L) of `count_confusions`, summed over all pictures.
    Returns: (L,) float64 in [0, 1]; not a number for a class that neither occurs nor is predicted.
    """
    hits = confusions.diagonal().double()
    return hits / (confusions.sum(dim=0) + confusions.sum(dim=1) - hits)


def mean_iou(confusions: Tensor) -> float:
    """Mean of `class_ious` over the classes that occur or are predicted."""
    return class_ious(confusions).nanmean().item()
