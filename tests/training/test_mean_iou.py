import math

import numpy as np
import pytest
import torch

from training.mean_iou import class_ious, count_confusions, mean_iou

VOID = 3


def test_the_mean_is_that_of_a_loop_over_pixels_and_void_counts_nowhere() -> None:
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 3, (2, 5, 7)), rng.integers(0, 4, (2, 5, 7))
    expected = []
    for label in range(3):
        pairs = [(p == label, t == label) for p, t in zip(predicted.flat, truth.flat, strict=True) if t != VOID]
        expected.append(sum(p and t for p, t in pairs) / sum(p or t for p, t in pairs))
    confusions = count_confusions(torch.from_numpy(predicted), torch.from_numpy(truth), num_classes=3)
    assert confusions.sum() == (truth != VOID).sum()
    assert class_ious(confusions).tolist() == pytest.approx(expected, abs=1e-12)
    assert mean_iou(confusions) == pytest.approx(np.mean(expected), abs=1e-12)


def test_confusions_have_the_true_class_in_the_row() -> None:
    confusions = count_confusions(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), num_classes=2)
    assert confusions.tolist() == [[1, 2], [0, 0]]


def test_a_class_that_neither_occurs_nor_is_predicted_does_not_count() -> None:
    confusions = count_confusions(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), num_classes=3)
    assert math.isnan(class_ious(confusions)[2])
    assert mean_iou(confusions) == pytest.approx((1 / 2 + 1 / 2) / 2)
