"""A reconstruction of TCFormerV2, micro, with a Semantic-FPN head on CamVid; trained as PaCa-ViT is there."""

from dataclasses import replace

from training.recipes.paca_fpn_micro_camvid import RECIPE as PACA
from training.recipes.paca_fpn_micro_camvid import SHORT as PACA_SHORT

_FACTS = replace(
    PACA.facts,
    is_default=False,
    description=(
        "A reconstruction of TCFormerV2, of which no code is public, in a small variant of ours with a Semantic-FPN "
        "head, trained from scratch on the street scenes of CamVid: each pixel gets one of eleven classes. Not for "
        "commercial use, as its training data are not."
    ),
)
RECIPE = replace(
    PACA,
    name="tcformer-v2-reconstruction-fpn-micro-camvid",
    model="tcformer-v2-reconstruction-fpn-micro",
    facts=_FACTS,
)
SHORT = replace(PACA_SHORT, name=f"{RECIPE.name}-short", model=RECIPE.model, facts=_FACTS)
