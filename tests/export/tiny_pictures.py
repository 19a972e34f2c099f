"""Small models of pictures with random weights, and the facts of their runs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from export.source import Source
from models.mta import MtaConfig
from models.paca_seg import PaCaFpnSegmenter, PaCaSegmenter
from models.paca_teacher import PaCaTeacherConfig, PaCaTeacherViTClassifier
from models.paca_vit import PaCaViTConfig
from models.semantic_fpn import SemanticFpnConfig
from models.tcformer import TCFormerClassifier, TCFormerConfig, TCFormerSegmenter
from models.tcformer_v2 import (
    TCFormerV2ReconstructionClassifier,
    TCFormerV2ReconstructionConfig,
    TCFormerV2ReconstructionSegmenter,
)
from tests.export.conftest import MEAN, STD
from tests.service.tiny_bundle import make_facts

HEIGHT, WIDTH = 44, 60  # 11 x 15 cells, which no later stage divides
LABELS = ["road", "tree", "sky"]

PACA = PaCaViTConfig(
    dims=(8, 16),
    num_heads=(1, 2),
    depths=(1, 1),
    mlp_ratios=(2, 2),
    num_clusters=(5, 4),
    clustering_kernel_sizes=(3, 3),
    onsite_clustering=(0, 0),
)
TEACHER = PaCaTeacherConfig(
    vit=PaCaViTConfig(
        dims=(8, 16),
        num_heads=(1, 2),
        depths=(1, 1),
        mlp_ratios=(2, 2),
        num_clusters=(5, 0),
        clustering_kernel_sizes=(3, 3),
        onsite_clustering=(0, 0),
        clustering="teacher",
    ),
    dims=(8, 16),
    depths=(1, 1),
    kernel_size=3,
)
TCFORMER = TCFormerConfig(
    dims=(8, 16, 24),
    num_heads=(1, 2, 2),
    depths=(1, 1, 1),
    mlp_ratios=(2, 2, 2),
    reduction_ratios=(4, 2, 1),
    sample_ratios=(0.25, 0.25),
)
RECONSTRUCTION = TCFormerV2ReconstructionConfig(
    backbone=TCFORMER, parts=((2, 2), (1, 2)), neck_dim=8, neck_num_heads=(2, 2), neck_mlp_ratios=(1, 1)
)
MTA = MtaConfig(dim=8, num_heads=(2, 2), mlp_ratios=(1, 1), reduction_ratios=(4, 2), num_outputs=3)
FPN = SemanticFpnConfig(pyramid_dim=8, dim=8)
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "teacher": partial(PaCaTeacherViTClassifier, TEACHER),
    "tcformer": partial(TCFormerClassifier, TCFORMER),
    "tcformer-v2-reconstruction": partial(TCFormerV2ReconstructionClassifier, RECONSTRUCTION),
}
SEGMENTERS: dict[str, Callable[..., nn.Module]] = {
    "paca": partial(PaCaSegmenter, PACA, head_dim=8),
    "paca-fpn": partial(PaCaFpnSegmenter, PACA, head=FPN),
    "tcformer": partial(TCFormerSegmenter, TCFORMER, neck=MTA, head=FPN),
    "tcformer-v2-reconstruction": partial(TCFormerV2ReconstructionSegmenter, RECONSTRUCTION, head=FPN),
}


def make_picture_model(build: Callable[..., nn.Module]) -> nn.Module:
    """A model in which every weight matters, those that start at zero too."""
    torch.manual_seed(0)
    model = build(num_classes=len(LABELS))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def make_picture_source(task: str) -> Source:
    facts = make_facts() | {"task": task, "normalisation": {"mean": MEAN, "std": STD}}
    facts["spec"] = {"labels": LABELS, "height": HEIGHT, "width": WIDTH, "max_pixels": 10_000_000}
    if task == "image-classification":
        facts["spec"] |= {"resize_shorter_side": WIDTH, "interpolation": "bilinear"}
    return Source.model_validate({name: facts[name] for name in Source.model_fields if name in facts})
