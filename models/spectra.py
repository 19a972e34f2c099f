"""What is done to a connectivity before a model sees it: its spectrum is limited, its connections get one scale.

A few directions, shared by all brains, hold most of a connectivity; what differs between subjects hides in the rest.

Source: ours, in the spirit of tangent-space connectivity (Varoquaux et al. 2010), which takes the logarithm of the
eigenvalues; the iteration is Newton and Schulz's (Higham 2008, "Functions of Matrices", section 5.3).
Deliberately absent: eigenvectors, which ONNX cannot compute; everything here is a product of matrices.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.communities import SharedMean

NUM_STEPS = 12  # each takes an eigenvalue 1.5 times closer to its limit; reaches 1e-4 up to 60 times the limit

LEAST_VARIANCE = 1e-12  # what is less is rounding: of subjects that do not differ nothing is blown up


def limit_spectrum(connectivity: Tensor, limit: float) -> Tensor:
    """Hold eigenvalues below a limit, softly: λ → λ / sqrt(1 + (λ/limit)²); small ones stay as they are.

    Args:
        connectivity: (B, R, R), symmetric, of any definiteness.
        limit: above 0, in the unit of the eigenvalues.
    Returns: (B, R, R), symmetric.
    """
    # Wanted is M·P^(-1/2) with P = 1 + (M/limit)²; all factors commute.
    identity = torch.eye(connectivity.shape[-1], dtype=connectivity.dtype, device=connectivity.device)
    scaled = connectivity / limit
    square = identity + scaled @ scaled
    bound = square.square().sum(dim=(1, 2), keepdim=True).sqrt()  # no eigenvalue of P is larger
    square = square / bound
    found = connectivity / bound.sqrt()
    for _ in range(NUM_STEPS):
        step = 1.5 * identity - 0.5 * square
        found = found @ step
        square = square @ step @ step
    return found


class Standardised(NamedTuple):
    """A connectivity in units of its spread among subjects, each (B, R, R).

    Attributes:
        whole: with what all subjects have in common.
        difference: from their mean.
    """

    whole: Tensor
    difference: Tensor


class Standard(nn.Module):
    """Brings connections to unit spread, and tells a subject from the mean of the training subjects.

    Mean and spread are running means as with scope "stored" of `SharedMean`; in training they are those of the batch.

    Args:
        num_regions: R.
        momentum: as in `SharedMean`.
    """

    def __init__(self, num_regions: int, *, momentum: float) -> None:
        super().__init__()
        self.mean = SharedMean(num_regions, num_regions, scope="stored", momentum=momentum)
        self.variance = SharedMean(scope="stored", momentum=momentum, start=1.0)

    def forward(self, connectivity: Tensor) -> Standardised:
        """(B, R, R) → both; among subjects each difference has mean 0, and the mean variance of all of them is 1."""
        difference = connectivity - self.mean(connectivity)
        variance = self.variance(difference.square().mean(dim=(1, 2)))
        spread = variance.clamp(min=LEAST_VARIANCE).sqrt()[:, None, None]
        return Standardised(connectivity / spread, difference / spread)
