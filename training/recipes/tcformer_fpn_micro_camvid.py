"""TCFormer micro with its neck and a Semantic-FPN head on CamVid: only the short run of the comparison.

Its first merge compares all pairs of tokens, 10,800 squared at the full size, so that a long run would take many hours.
"""

from dataclasses import replace

from training.recipes.paca_fpn_micro_camvid import SHORT as PACA

SHORT = replace(
    PACA,
    name="tcformer-fpn-micro-camvid-short",
    model="tcformer-fpn-micro",
    facts=replace(
        PACA.facts,
        is_default=False,
        description=(
            "TCFormer (Zeng et al. 2022) in a small variant of ours with a Semantic-FPN head, trained from scratch and "
            "briefly on the street scenes of CamVid, to be compared with PaCa-ViT and TCFormerV2. Not for commercial "
            "use, as its training data are not."
        ),
    ),
)
