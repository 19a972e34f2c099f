"""Plans for image classifiers: PaCa-ViT, with and without a teacher, and TCFormer of both versions."""

from torch import nn

from export.explanations import EvidenceModel, describe_explanation
from export.picture_program import plan_pictures
from export.plan import Plan
from export.source import Source
from models.paca_teacher import PaCaTeacherViTClassifier
from models.paca_vit import PaCaViTClassifier
from models.tcformer import TCFormerClassifier
from models.tcformer_v2 import TCFormerV2ReconstructionClassifier
from service.tasks.explanations import EVIDENCE
from service.tasks.image_classification import ImageClassificationSpec

KINDS = (PaCaViTClassifier, PaCaTeacherViTClassifier, TCFormerClassifier, TCFormerV2ReconstructionClassifier)
NUM_PARITY_PICTURES = 24


def plan_image_classifier(source: Source, model: nn.Module) -> Plan:
    """Plan the bundle of an image classifier.

    Args:
        source: facts about the weights.
        model: with the weights.
    Raises: ValueError if the model is of a kind that has no program here.
    """
    if not isinstance(model, KINDS):
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"{type(model).__name__} has no image classification program; one of {kinds} has")
    spec = ImageClassificationSpec.model_validate(source.spec)
    explanation = describe_explanation(model, height=spec.height, width=spec.width)
    explained: nn.Module = model
    if isinstance(model, PaCaViTClassifier | PaCaTeacherViTClassifier) and explanation is not None:
        explained = EvidenceModel(model)
    return plan_pictures(
        explained,
        source.normalisation,
        spec,
        spec=source.spec | {"explanation": None if explanation is None else explanation.model_dump(mode="json")},
        num_crops=NUM_PARITY_PICTURES,
        further_outputs=[EVIDENCE] if isinstance(explained, EvidenceModel) else [],
    )
