"""TCFormer micro on CIFAR-10 (JPEG copy), and the short runs that compare it with PaCa-ViT micro."""

from dataclasses import replace

from training.recipes.paca_vit_micro_cifar10 import FIRST as PACA

RECIPE = replace(
    PACA,
    name="tcformer-micro-cifar10",
    model="tcformer-micro",
    epochs=12,
    facts=replace(
        PACA.facts,
        description=(
            "TCFormer (Zeng et al. 2022) in a small variant of ours for pictures of 32x32 pixels, trained from scratch "
            "on the ten classes of CIFAR-10: its tokens are clusters of pixels, of any shape. A demonstration that is "
            "small enough to ship."
        ),
        limits=PACA.facts.limits
        + (
            " Its tokens are hardly dynamic: nine in ten of the first merge's are a 2x2 block of cells, of the "
            "second's a 4x4 block."
        ),
    ),
)
SHORT_EPOCHS = 2
SHORT = replace(RECIPE, name="tcformer-micro-cifar10-short", epochs=SHORT_EPOCHS, ema_decay=0.99)
PACA_SHORT = replace(PACA, name="paca-vit-micro-cifar10-short", epochs=SHORT_EPOCHS, ema_decay=0.99)
