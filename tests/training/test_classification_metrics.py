import pytest
import torch

from training.classification_metrics import auroc, measure_classes


def test_the_area_counts_pairs_in_the_right_order_and_half_of_the_ties() -> None:
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1])
    assert auroc(scores, labels) == 0.875  # of four pairs three are right and one ties
    assert auroc(-scores, labels) == 0.125
    assert auroc(torch.zeros(4), labels) == 0.5


def test_the_area_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="both classes"):
        auroc(torch.zeros(3), torch.ones(3))


def test_sensitivity_is_of_class_1_and_specificity_of_class_0() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    found = measure_classes(logits, labels)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["sensitivity"] == pytest.approx(2 / 3)
    assert found["specificity"] == pytest.approx(1 / 2)
    assert found["auroc"] == pytest.approx(4.5 / 6)  # one of six pairs ties, one is wrong
    assert next(iter(found)) == "auroc"


def test_of_many_classes_only_accuracy_is_told() -> None:
    assert measure_classes(torch.eye(3), torch.tensor([0, 1, 0])) == {"accuracy": pytest.approx(2 / 3)}
