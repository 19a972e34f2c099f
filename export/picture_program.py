"""The module that becomes the program of a model of pictures: raw pixels in, logits and cluster maps out."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.pictures import cut_crops, read_photos
from export.plan import BATCH_SIZES, EXPORT_BATCH, Plan
from models.paca_vit import PaCaViT
from models.tcformer import TCFormer
from service.bundle import Normalisation, TensorSpec
from service.tasks.pictures import PictureSpec

# Hard clusters are decided by comparing distances; a near tie may fall differently in a few cells of a few pictures.
MAX_SHARE_OFF = 0.05


class PictureProgram(nn.Module):
    """A model of pictures with its normalisation.

    The scale of the normalisation is folded into the first convolution. The mean is not: the convolution pads with
    zeros, which stand for the mean colour only after it was subtracted.

    Args:
        model: takes (B, 3, Y, X) normalised, gives logits and a list with the clusters of each clustered stage, shares
            (B, C, N) or the token of each cell (B, N); what else it gives is left out; its first convolution is
            changed.
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
        """Uint8 (B, Y, X, 3) → logits, then the clusters of each clustered stage, float32 or int32."""
        pixels = image.permute(0, 3, 1, 2).float() - self.mean  # (B, 3, Y, X)
        logits, clusters = self.model(pixels)[:2]
        return (logits, *(stage if stage.is_floating_point() else stage.int() for stage in clusters))


def plan_pictures(
    model: nn.Module,
    normalisation: Normalisation,
    framing: PictureSpec,
    *,
    spec: dict[str, Any],
    num_crops: int,
    further_outputs: Sequence[str] = (),
) -> Plan:
    """Plan the bundle of a model of pictures.

    Args:
        model: with the weights; its `backbone` is a PaCa-ViT or a TCFormer.
        normalisation: what it was trained with.
        framing: how the sample photos become pictures of the program's size.
        spec: what the manifest tells the task.
        num_crops: pictures for parity.
        further_outputs: names of what the model gives behind the clusters of its last stage.
    """
    program = PictureProgram(deepcopy(model), normalisation).eval()
    photos, crops = read_photos(framing), cut_crops(framing, num_crops)
    backbone = model.backbone
    assert isinstance(backbone, PaCaViT | TCFormer)
    names = ["logits", *(f"clusters_stage{stage}" for stage in clustered_stages(backbone)), *further_outputs]
    with torch.inference_mode():
        outputs = program(torch.from_numpy(photos[:1]))
    return Plan(
        program=program,
        spec=spec,
        inputs=(TensorSpec(name="image", dtype="uint8", shape=("batch", framing.height, framing.width, 3)),),
        outputs=tuple(_describe(name, tensor) for name, tensor in zip(names, outputs, strict=True)),
        example={"image": np.repeat(photos[:1], EXPORT_BATCH, axis=0)},
        golden={"image": photos},
        parity_inputs=f"{num_crops} random crops of the photos in samples/",
        parity_batches=tuple(
            {"image": crops[start : start + size]}
            for size in BATCH_SIZES
            for start in range(0, len(crops) - size + 1, size)
        ),
        max_share_off=MAX_SHARE_OFF if isinstance(backbone, TCFormer) else 0.0,
    )


def clustered_stages(backbone: PaCaViT | TCFormer) -> Sequence[int]:
    """Numbers of the stages, from 1, that tell clusters, in the order in which the model gives these."""
    if isinstance(backbone, TCFormer):
        return range(2, len(backbone.config.dims) + 1)
    return [stage for stage, num_clusters in enumerate(backbone.config.num_clusters, start=1) if num_clusters]


def _describe(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=("batch", *tensor.shape[1:]))
