"""How well classes are told apart: area under the ROC curve, accuracy, sensitivity, specificity."""

from torch import Tensor


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Chance that a random member of class 1 scores above a random one of class 0; ties count half.

    Args:
        scores: (N,).
        labels: (N,), 0 or 1.
    Raises: ValueError if a class has no member.
    """
    positives, negatives = scores[labels == 1].double(), scores[labels == 0].double()
    if not len(positives) or not len(negatives):
        raise ValueError("all labels are the same; the area under the curve needs members of both classes")
    differences = positives[:, None] - negatives
    return ((differences > 0).double() + 0.5 * (differences == 0).double()).mean().item()


def measure_classes(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure a classifier; class 1 is what is looked for where there are two.

    Args:
        logits: (N, L).
        labels: (N,) int64.
    Returns: `auroc`, `accuracy`, `sensitivity` and `specificity`; of more than two classes `accuracy` only.
    Raises: ValueError as `auroc`.
    """
    found = logits.argmax(dim=1)
    is_right = (found == labels).double()
    if logits.shape[1] > 2:
        return {"accuracy": is_right.mean().item()}
    return {
        "auroc": auroc(logits[:, 1] - logits[:, 0], labels),
        "accuracy": is_right.mean().item(),
        "sensitivity": is_right[labels == 1].mean().item(),
        "specificity": is_right[labels == 0].mean().item(),
    }
