from training.recipes.paca_vit_micro_cifar10 import FIRST as PACA_VIT_MICRO_CIFAR10_FIRST
from training.recipes.paca_vit_micro_cifar10 import RECIPE as PACA_VIT_MICRO_CIFAR10

# Name of a run, and of the bundle made of it → how it is trained.
RECIPES = {
    "paca-vit-micro-cifar10-first": PACA_VIT_MICRO_CIFAR10_FIRST,
    "paca-vit-micro-cifar10": PACA_VIT_MICRO_CIFAR10,
}
