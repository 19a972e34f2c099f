"""The module that becomes an image classifier's program: raw pixels in, logits and cluster maps out."""

import torch
from torch import Tensor, nn

from service.bundle import Normalisation


class ImageClassifierProgram(nn.Module):
    """A classifier with its normalisation.

    The scale of the normalisation is folded into the first convolution. The mean is not: the convolution pads with
    zeros, which stand for the mean colour only after it was subtracted.

    Args:
        model: takes (B, 3, Y, X) normalised, gives logits (B, L) and one assignment (B, C, N) per clustered stage;
            its first convolution is changed.
        first: that first convolution.
        normalisation: what the model was trained with.
    """

    def __init__(self, model: nn.Module, first: nn.Conv2d, normalisation: Normalisation) -> None:
        super().__init__()
        self.model = model
        scale = 1.0 / (255.0 * torch.tensor(normalisation.std, dtype=torch.float64))
        folded = first.weight.detach().double() * scale[:, None, None]
        first.weight = nn.Parameter(folded.float())
        mean = 255.0 * torch.tensor(normalisation.mean, dtype=torch.float64)
        self.mean = nn.Buffer(mean.float()[:, None, None])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Uint8 (B, Y, X, 3) → logits (B, L), then one (B, C, N) for each clustered stage."""
        pixels = image.permute(0, 3, 1, 2).float() - self.mean  # (B, 3, Y, X)
        logits, clusters = self.model(pixels)
        return (logits, *clusters)
