from collections.abc import Callable
from functools import partial

from torch import nn

from models.ctc_transformer import CTC_TRANSFORMER_SMALL, CTC_TRANSFORMER_SMALL_FULL, CtcTransformer
from models.paca_vit import (
    PACA_VIT_BASE,
    PACA_VIT_MICRO,
    PACA_VIT_SMALL,
    PACA_VIT_SMALL_BLOCKWISE,
    PACA_VIT_SMALL_MLP,
    PACA_VIT_TINY,
    PaCaViTClassifier,
)

# Name of a variant → callable that takes `num_classes` and gives a model with fresh weights.
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "paca-vit-micro": partial(PaCaViTClassifier, PACA_VIT_MICRO),
    "paca-vit-tiny": partial(PaCaViTClassifier, PACA_VIT_TINY),
    "paca-vit-small": partial(PaCaViTClassifier, PACA_VIT_SMALL),
    "paca-vit-small-mlp": partial(PaCaViTClassifier, PACA_VIT_SMALL_MLP),
    "paca-vit-small-blockwise": partial(PaCaViTClassifier, PACA_VIT_SMALL_BLOCKWISE),
    "paca-vit-base": partial(PaCaViTClassifier, PACA_VIT_BASE),
    "ctc-transformer-small": partial(CtcTransformer, CTC_TRANSFORMER_SMALL),
    "ctc-transformer-small-full": partial(CtcTransformer, CTC_TRANSFORMER_SMALL_FULL),
}
