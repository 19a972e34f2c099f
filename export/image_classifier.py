"""The module that becomes an image classifier's program: raw pixels in, logits and cluster maps out."""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from export.pictures import cut_crops, read_photos
from export.plan import EXPORT_BATCH, Plan
from export.source import Source
from models.paca_vit import PaCaViTClassifier
from service.bundle import Normalisation, TensorSpec
from service.tasks.image_classification import ImageClassificationSpec

NUM_PARITY_PICTURES = 24
BATCH_SIZES = (1, 3, 8)  # none is the export's own


class ImageClassifierProgram(nn.Module):
    """A classifier with its normalisation.

    The scale of the normalisation is folded into the first convolution. The mean is not: the convolution pads with
    zeros, which stand for the mean colour only after it was subtracted.

    Args:
        model: takes (B, 3, Y, X) normalised, gives logits (B, L) and one assignment (B, C, N) per clustered stage;
            its first convolution is changed.
        normalisation: what the model was trained with, one number for each channel.
    """

    def __init__(self, model: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.model = model
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
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


def plan_image_classifier(source: Source, model: nn.Module) -> Plan:
    """Plan the bundle of an image classifier.

    Args:
        source: facts about the weights.
        model: with the weights.
    Raises: ValueError if the model is of a kind that has no program here.
    """
    if not isinstance(model, PaCaViTClassifier):
        raise ValueError(f"{type(model).__name__} has no image classification program; one of PaCaViTClassifier has")
    spec = ImageClassificationSpec.model_validate(source.spec)
    program = ImageClassifierProgram(deepcopy(model), source.normalisation).eval()
    photos, crops = read_photos(spec), cut_crops(spec, NUM_PARITY_PICTURES)
    names = ["logits", *(f"clusters_stage{i + 1}" for i, c in enumerate(model.backbone.config.num_clusters) if c)]
    with torch.inference_mode():
        shapes = [tuple(tensor.shape[1:]) for tensor in program(torch.from_numpy(photos[:1]))]
    return Plan(
        program=program,
        spec=source.spec,
        inputs=(TensorSpec(name="image", dtype="uint8", shape=("batch", spec.height, spec.width, 3)),),
        outputs=tuple(
            TensorSpec(name=name, dtype="float32", shape=("batch", *shape))
            for name, shape in zip(names, shapes, strict=True)
        ),
        example={"image": np.repeat(photos[:1], EXPORT_BATCH, axis=0)},
        golden={"image": photos},
        parity_inputs=f"{NUM_PARITY_PICTURES} random crops of the photos in samples/",
        parity_batches=tuple(
            {"image": crops[start : start + size]}
            for size in BATCH_SIZES
            for start in range(0, len(crops) - size + 1, size)
        ),
    )
