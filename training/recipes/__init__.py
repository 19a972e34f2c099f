from training.recipes.ctc_transformer_micro_fsdd import RECIPE as CTC_TRANSFORMER_MICRO_FSDD
from training.recipes.ctc_transformer_small_an4 import FIRST as CTC_TRANSFORMER_SMALL_AN4_FIRST
from training.recipes.ctc_transformer_small_an4 import RECIPE as CTC_TRANSFORMER_SMALL_AN4
from training.recipes.paca_fpn_micro_camvid import RECIPE as PACA_FPN_MICRO_CAMVID
from training.recipes.paca_fpn_micro_camvid import SHORT as PACA_FPN_MICRO_CAMVID_SHORT
from training.recipes.paca_vit_micro_cifar10 import FIRST as PACA_VIT_MICRO_CIFAR10_FIRST
from training.recipes.paca_vit_micro_cifar10 import RECIPE as PACA_VIT_MICRO_CIFAR10
from training.recipes.tcformer_fpn_micro_camvid import SHORT as TCFORMER_FPN_MICRO_CAMVID_SHORT
from training.recipes.tcformer_micro_cifar10 import PACA_SHORT as PACA_VIT_MICRO_CIFAR10_SHORT
from training.recipes.tcformer_micro_cifar10 import RECIPE as TCFORMER_MICRO_CIFAR10
from training.recipes.tcformer_micro_cifar10 import SHORT as TCFORMER_MICRO_CIFAR10_SHORT
from training.recipes.tcformer_v2_reconstruction_fpn_micro_camvid import (
    RECIPE as TCFORMER_V2_RECONSTRUCTION_FPN_MICRO_CAMVID,
)
from training.recipes.tcformer_v2_reconstruction_fpn_micro_camvid import (
    SHORT as TCFORMER_V2_RECONSTRUCTION_FPN_MICRO_CAMVID_SHORT,
)
from training.recipes.thc_aal116_abide import RECIPE as THC_AAL116_ABIDE

# Name of a run, and of the bundle made of it → how it is trained.
RECIPES = {
    "paca-vit-micro-cifar10-first": PACA_VIT_MICRO_CIFAR10_FIRST,
    "paca-vit-micro-cifar10": PACA_VIT_MICRO_CIFAR10,
    "ctc-transformer-small-an4-first": CTC_TRANSFORMER_SMALL_AN4_FIRST,
    "paca-fpn-micro-camvid-short": PACA_FPN_MICRO_CAMVID_SHORT,
    "paca-fpn-micro-camvid": PACA_FPN_MICRO_CAMVID,
    "tcformer-fpn-micro-camvid-short": TCFORMER_FPN_MICRO_CAMVID_SHORT,
    "tcformer-v2-reconstruction-fpn-micro-camvid-short": TCFORMER_V2_RECONSTRUCTION_FPN_MICRO_CAMVID_SHORT,
    "tcformer-v2-reconstruction-fpn-micro-camvid": TCFORMER_V2_RECONSTRUCTION_FPN_MICRO_CAMVID,
    "paca-vit-micro-cifar10-short": PACA_VIT_MICRO_CIFAR10_SHORT,
    "tcformer-micro-cifar10-short": TCFORMER_MICRO_CIFAR10_SHORT,
    "tcformer-micro-cifar10": TCFORMER_MICRO_CIFAR10,
    "ctc-transformer-micro-fsdd": CTC_TRANSFORMER_MICRO_FSDD,
    "ctc-transformer-small-an4": CTC_TRANSFORMER_SMALL_AN4,
    "thc-aal116-abide": THC_AAL116_ABIDE,
}
