"""Plans for segmenters: PaCa-ViT with either head, and TCFormer of both versions with a Semantic-FPN head."""

from dataclasses import replace

from torch import nn

from export.explanations import describe_explanation
from export.picture_program import plan_pictures
from export.plan import Plan
from export.source import Source
from models.paca_seg import PaCaFpnSegmenter, PaCaSegmenter
from models.tcformer import TCFormerSegmenter
from models.tcformer_v2 import TCFormerV2ReconstructionSegmenter
from service.tasks.pictures import PictureSpec

KINDS = (PaCaSegmenter, PaCaFpnSegmenter, TCFormerSegmenter, TCFormerV2ReconstructionSegmenter)
NUM_PARITY_PICTURES = 8


def plan_image_segmenter(source: Source, model: nn.Module) -> Plan:
    """Plan the bundle of a segmenter.

    Its logits stay at the size of the model, (B, L, ⌈Y / 4⌉, ⌈X / 4⌉); the task knows the size of the picture sent.

    Args:
        source: facts about the weights; of its spec, `height` and `width` are looked at.
        model: with the weights.
    Raises: ValueError if the model is of a kind that has no program here.
    """
    if not isinstance(model, KINDS):
        kinds = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(f"{type(model).__name__} has no segmentation program; one of {kinds} has")
    height, width = source.spec["height"], source.spec["width"]
    framing = PictureSpec(
        height=height,
        width=width,
        resize_shorter_side=max(height, width),
        interpolation="bicubic",
        max_pixels=source.spec["max_pixels"],
    )
    explanation = describe_explanation(model, height=height, width=width)
    told = None if explanation is None else explanation.model_dump(mode="json")
    plan = plan_pictures(
        model,
        source.normalisation,
        framing,
        spec=source.spec | {"explanation": told},
        num_crops=NUM_PARITY_PICTURES,
    )
    # Cluster maps of pictures this large take more room than the weights, and parity has compared them.
    golden = {name: array[:1] for name, array in plan.golden.items()}
    return replace(plan, golden=golden, golden_outputs=("logits",))
