"""Variants of TCFormer that are small enough for tests."""

from dataclasses import replace

from models.mta import MtaConfig
from models.tcformer import TCFormerConfig
from models.tcformer_v2 import TCFormerV2ReconstructionConfig

SMALL = TCFormerConfig(
    dims=(8, 12, 16),
    num_heads=(1, 2, 2),
    depths=(1, 2, 1),
    mlp_ratios=(2, 2, 2),
    reduction_ratios=(4, 2, 1),
    sample_ratios=(0.25, 0.5),
)
SMALL_NECK = MtaConfig(dim=8, num_heads=(2, 2), mlp_ratios=(2, 2), reduction_ratios=(4, 2), num_outputs=3)
SMALL_V2 = TCFormerV2ReconstructionConfig(
    backbone=replace(SMALL, sample_ratios=(0.25, 0.25)),
    parts=((2, 2), (1, 1)),
    neck_dim=8,
    neck_num_heads=(2, 2),
    neck_mlp_ratios=(2, 2),
)
