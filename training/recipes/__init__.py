from training.recipes.ctc_transformer_small_an4 import FIRST as CTC_TRANSFORMER_SMALL_AN4_FIRST
from training.recipes.ctc_transformer_small_an4 import RECIPE as CTC_TRANSFORMER_SMALL_AN4
from training.recipes.paca_vit_micro_cifar10 import FIRST as PACA_VIT_MICRO_CIFAR10_FIRST
from training.recipes.paca_vit_micro_cifar10 import RECIPE as PACA_VIT_MICRO_CIFAR10

# Name of a run, and of the bundle made of it → how it is trained.
RECIPES = {
    "paca-vit-micro-cifar10-first": PACA_VIT_MICRO_CIFAR10_FIRST,
    "paca-vit-micro-cifar10": PACA_VIT_MICRO_CIFAR10,
    "ctc-transformer-small-an4-first": CTC_TRANSFORMER_SMALL_AN4_FIRST,
    "ctc-transformer-small-an4": CTC_TRANSFORMER_SMALL_AN4,
}
