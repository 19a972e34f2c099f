"""What a program of pictures can tell of its clusters, so that the service explains answers with them."""

import torch
from torch import Tensor, nn

from models.paca_teacher import PaCaTeacherViTClassifier
from models.paca_vit import PaCaViT, PaCaViTClassifier
from models.tcformer import TCFormer
from service.tasks.explanations import ClusteredStage, ExplanationSpec


class EvidenceModel(nn.Module):
    """A PaCa classifier whose evidence comes behind its clusters.

    Args:
        model: the classifier.
    """

    def __init__(self, model: PaCaViTClassifier | PaCaTeacherViTClassifier) -> None:
        super().__init__()
        self.model = model

    @property
    def backbone(self) -> PaCaViT:
        """Of the classifier."""
        return self.model.backbone

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised pictures (B, 3, Y, X) → logits (B, L); assignments (B, C, N), then the evidence (B, L, Y, X)."""
        logits, clusters, evidence = self.model.explain(image)
        return logits, [*clusters, evidence]


def describe_explanation(model: nn.Module, *, height: int, width: int) -> ExplanationSpec | None:
    """Tell which clusters explain a model's answers; None where it has none.

    Args:
        model: a classifier or segmenter of pictures with a PaCa-ViT or a TCFormer as its backbone.
        height, width: of the pictures.
    """
    blank = torch.zeros(1, 3, height, width)
    with torch.inference_mode():
        if isinstance(model.backbone, TCFormer):
            links = [level.links for level in model.backbone(blank)]
            stages = _number([None if link.token_of_cell is None else link.cell_grid for link in links])
            return ExplanationSpec(kind="token_regions", stages=stages)
        assert isinstance(model.backbone, PaCaViT)
        outputs = model.see(blank) if isinstance(model, PaCaTeacherViTClassifier) else model.backbone(blank)
    stages = _number([None if stage.clusters is None else stage.grid for stage in outputs])
    return ExplanationSpec(kind="patch_clusters", stages=stages) if stages else None


def _number(grids: list[tuple[int, int] | None]) -> tuple[ClusteredStage, ...]:
    return tuple(ClusteredStage(stage=stage, grid=grid) for stage, grid in enumerate(grids, 1) if grid is not None)
