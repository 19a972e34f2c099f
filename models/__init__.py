from collections.abc import Callable
from functools import partial

from torch import nn

from models.brain_baselines import BNT_AAL116, BRAIN_MLP_AAL116, BrainMlp, BrainNetworkTransformer
from models.ctc_transformer import (
    CTC_TRANSFORMER_MICRO,
    CTC_TRANSFORMER_SMALL,
    CTC_TRANSFORMER_SMALL_FULL,
    CtcTransformer,
)
from models.mta import MTA_MICRO
from models.paca_seg import (
    FPN_MICRO,
    PACA_FPN_MICRO,
    PACA_SEG_BASE,
    PACA_SEG_SMALL,
    PACA_SEG_TINY,
    PaCaFpnSegmenter,
    PaCaSegmenter,
)
from models.paca_teacher import PACA_TEACHER_BASE, PACA_TEACHER_SMALL, PACA_TEACHER_TINY, PaCaTeacherViTClassifier
from models.paca_vit import (
    PACA_VIT_BASE,
    PACA_VIT_MICRO,
    PACA_VIT_SMALL,
    PACA_VIT_SMALL_2_0,
    PACA_VIT_SMALL_49_0,
    PACA_VIT_SMALL_49_100,
    PACA_VIT_SMALL_100_49,
    PACA_VIT_SMALL_100_100,
    PACA_VIT_SMALL_BLOCKWISE,
    PACA_VIT_SMALL_MLP,
    PACA_VIT_TINY,
    PaCaViTClassifier,
)
from models.tcformer import (
    TCFORMER_BASE,
    TCFORMER_FPN_MICRO,
    TCFORMER_LARGE,
    TCFORMER_LIGHT,
    TCFORMER_MICRO,
    TCFormerClassifier,
    TCFormerSegmenter,
)
from models.tcformer_v2 import (
    TCFORMER_V2_RECONSTRUCTION_BASE,
    TCFORMER_V2_RECONSTRUCTION_FPN_MICRO,
    TCFormerV2ReconstructionClassifier,
    TCFormerV2ReconstructionSegmenter,
)
from models.thc import Thc
from models.thc_config import THC_AAL116, THC_CC200, THC_CC200_FLAT, THC_CC200_OFFICIAL

# Name of a variant → callable that takes `num_classes` and gives a model with fresh weights.
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "paca-vit-micro": partial(PaCaViTClassifier, PACA_VIT_MICRO),
    "paca-vit-tiny": partial(PaCaViTClassifier, PACA_VIT_TINY),
    "paca-vit-small": partial(PaCaViTClassifier, PACA_VIT_SMALL),
    "paca-vit-small-mlp": partial(PaCaViTClassifier, PACA_VIT_SMALL_MLP),
    "paca-vit-small-blockwise": partial(PaCaViTClassifier, PACA_VIT_SMALL_BLOCKWISE),
    "paca-vit-base": partial(PaCaViTClassifier, PACA_VIT_BASE),
    "paca-vit-small-100-100": partial(PaCaViTClassifier, PACA_VIT_SMALL_100_100),
    "paca-vit-small-100-49": partial(PaCaViTClassifier, PACA_VIT_SMALL_100_49),
    "paca-vit-small-49-100": partial(PaCaViTClassifier, PACA_VIT_SMALL_49_100),
    "paca-vit-small-49-0": partial(PaCaViTClassifier, PACA_VIT_SMALL_49_0),
    "paca-vit-small-2-0": partial(PaCaViTClassifier, PACA_VIT_SMALL_2_0),
    "paca-teacher-tiny": partial(PaCaTeacherViTClassifier, PACA_TEACHER_TINY),
    "paca-teacher-small": partial(PaCaTeacherViTClassifier, PACA_TEACHER_SMALL),
    "paca-teacher-base": partial(PaCaTeacherViTClassifier, PACA_TEACHER_BASE),
    "paca-seg-tiny": partial(PaCaSegmenter, PACA_SEG_TINY),
    "paca-seg-small": partial(PaCaSegmenter, PACA_SEG_SMALL),
    "paca-seg-base": partial(PaCaSegmenter, PACA_SEG_BASE),
    "paca-fpn-micro": partial(PaCaFpnSegmenter, PACA_FPN_MICRO, head=FPN_MICRO),
    "paca-fpn-tiny": partial(PaCaFpnSegmenter, PACA_SEG_TINY),
    "paca-fpn-small": partial(PaCaFpnSegmenter, PACA_SEG_SMALL),
    "paca-fpn-base": partial(PaCaFpnSegmenter, PACA_SEG_BASE),
    "tcformer-micro": partial(TCFormerClassifier, TCFORMER_MICRO),
    "tcformer-light": partial(TCFormerClassifier, TCFORMER_LIGHT),
    "tcformer-base": partial(TCFormerClassifier, TCFORMER_BASE),
    "tcformer-large": partial(TCFormerClassifier, TCFORMER_LARGE),
    "tcformer-fpn-micro": partial(TCFormerSegmenter, TCFORMER_FPN_MICRO, neck=MTA_MICRO, head=FPN_MICRO),
    "tcformer-fpn-light": partial(TCFormerSegmenter, TCFORMER_LIGHT),
    "tcformer-fpn-base": partial(TCFormerSegmenter, TCFORMER_BASE),
    "tcformer-fpn-large": partial(TCFormerSegmenter, TCFORMER_LARGE),
    "tcformer-v2-reconstruction-base": partial(TCFormerV2ReconstructionClassifier, TCFORMER_V2_RECONSTRUCTION_BASE),
    "tcformer-v2-reconstruction-fpn-micro": partial(
        TCFormerV2ReconstructionSegmenter, TCFORMER_V2_RECONSTRUCTION_FPN_MICRO, head=FPN_MICRO
    ),
    "tcformer-v2-reconstruction-fpn-base": partial(TCFormerV2ReconstructionSegmenter, TCFORMER_V2_RECONSTRUCTION_BASE),
    "ctc-transformer-micro": partial(CtcTransformer, CTC_TRANSFORMER_MICRO),
    "ctc-transformer-small": partial(CtcTransformer, CTC_TRANSFORMER_SMALL),
    "ctc-transformer-small-full": partial(CtcTransformer, CTC_TRANSFORMER_SMALL_FULL),
    "thc-aal116": partial(Thc, THC_AAL116),
    "thc-cc200": partial(Thc, THC_CC200),
    "thc-cc200-official": partial(Thc, THC_CC200_OFFICIAL),
    "thc-cc200-flat": partial(Thc, THC_CC200_FLAT),
    "bnt-aal116": partial(BrainNetworkTransformer, BNT_AAL116),
    "brain-mlp-aal116": partial(BrainMlp, BRAIN_MLP_AAL116),
}
