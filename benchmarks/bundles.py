"""The bundle of the speed goals: a PaCa-ViT of about 5 CPU-ms a picture, with random weights.

Its numbers are chosen for the time they take and for nothing else; it classifies nothing.
"""

from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from export.bundles import write_bundle
from export.source import Source
from models.paca_vit import PaCaViTClassifier, PaCaViTConfig
from service.bundle import MANIFEST, Bundle, Normalisation, Origin, open_bundle

SIDE_PIXELS = 160
NUM_CLASSES = 100
MAX_BATCH = 16
SEED = 1
CONFIG = PaCaViTConfig(
    dims=(24, 48, 96, 160), num_heads=(1, 2, 4, 4), depths=(1, 2, 2, 2), num_clusters=(49, 49, 49, 0)
)
IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # torchvision's reference transforms


def open_random_bundle(folder: Path) -> Bundle:
    """Open the bundle, made first if it is not there or of another configuration.

    Args:
        folder: of the bundle.
    """
    recipe = f"random weights; {SIDE_PIXELS} pixels; {CONFIG}"
    if (folder / MANIFEST).exists():
        bundle = open_bundle(folder)
        if bundle.manifest.origin.recipe == recipe:
            return bundle
    print(f"exporting {folder}", flush=True)
    write_bundle(_describe(folder.name, recipe), _make_model(), folder)
    return open_bundle(folder)


def _make_model() -> nn.Module:
    torch.manual_seed(SEED)
    model = PaCaViTClassifier(CONFIG, num_classes=NUM_CLASSES)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.trunc_normal_(weight, std=0.02)  # residual branches start at zero, and zeros prove nothing
            weight.copy_(weight.half().float())
    return model.eval()


def _describe(name: str, recipe: str) -> Source:
    return Source(
        name=name,
        version="0.1.0",
        task="image-classification",
        default=True,
        created=datetime.now(UTC).replace(microsecond=0),
        owned_by="benchmarks",
        description="A program to measure servers with.",
        limits="Its answers mean nothing.",
        license="Apache-2.0",
        origin=Origin(
            architecture="paca-vit",
            command="python -m benchmarks",
            seed=SEED,
            minutes=0.0,
            hardware="none",
            recipe=recipe,
            data="none",
            data_license="none",
        ),
        normalisation=IMAGENET,
        spec={
            "height": SIDE_PIXELS,
            "width": SIDE_PIXELS,
            "resize_shorter_side": SIDE_PIXELS,
            "interpolation": "bicubic",
            "max_pixels": 10_000_000,
            "labels": [f"class {index}" for index in range(NUM_CLASSES)],
        },
        max_body_bytes=10_000_000,
        max_batch=MAX_BATCH,
        quality={},
    )
