from training.recipes.paca_vit_micro_cifar10 import RECIPE as PACA_VIT_MICRO_CIFAR10

# Name of a bundle → how it is trained.
RECIPES = {
    "paca-vit-micro-cifar10": PACA_VIT_MICRO_CIFAR10,
}
