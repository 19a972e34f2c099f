"""What the tests of conversions share: official checkpoints with random weights, pictures, and answers of a service."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from service.app import create_app
from service.bundle import Manifest, Normalisation
from service.settings import Settings
from service.tasks.image_classification import ImageClassificationSpec
from service.tasks.image_segmentation import ImageSegmentationSpec
from service.tasks.letterbox import decode_letter
from service.tasks.picture_files import Pixels
from service.tasks.pictures import decode_picture

SCORES = 1e-4  # largest difference of a score to the module's, whose sums run in another order
PIXELS = 0.999  # share of a mask; where two classes all but tie the order of sums decides


def save(folder: Path, state: Mapping[str, Tensor], *, wrapper: str = "state_dict", prefix: str = "") -> Path:
    """Write a checkpoint as publishers do."""
    path = folder / "official.pth"
    torch.save({wrapper: {f"{prefix}{name}": tensor for name, tensor in state.items()}, "epoch": 300}, path)
    return path


def fill_official(keys: Path) -> dict[str, Tensor]:
    """Random tensors with the names, shapes and types of a published checkpoint, in the range of trained ones.

    Args:
        keys: describes the checkpoint.
    """
    described = json.loads(keys.read_text())["state_dict"]
    generator = torch.Generator().manual_seed(0)
    return {name: _fill(name, one["shape"], one["dtype"], generator) for name, one in described.items()}


def _fill(name: str, shape: list[int], dtype: str, generator: torch.Generator) -> Tensor:
    if dtype == "int64":  # batches that a norm has seen
        return torch.ones(shape, dtype=torch.int64)
    numbers = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return numbers / numbers[0].numel() ** 0.5
    if name.endswith("running_var"):
        return 1 + 0.2 * numbers.abs()
    return 0.1 * numbers if name.endswith(("bias", "running_mean")) else 1 + 0.2 * numbers


def make_picture(width: int, height: int) -> Image.Image:
    """A smooth picture: on others the order of resizing and cutting shows."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    channels = [127 + 120 * np.sin(5 * x), 127 + 120 * np.cos(7 * y), 255 * x * y]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


async def ask(
    bundle: Path, cache: Path, body: bytes, *, task: str = "image-classification", **query: Any
) -> dict[str, Any]:
    """Serve the bundle, which lies in a folder with no others, in this process, and send it a picture."""
    app = create_app(Settings(bundles=bundle.parent, cache=cache, device="cpu", workers=1, decode_threads=1))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://t") as client,
    ):
        answer = await client.post(f"/v1/{task}/{bundle.name}", content=body, params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def assert_scores(answer: dict[str, Any], model: nn.Module, body: bytes, manifest: Manifest) -> None:
    """Hold an answer with the scores of all classes to the module's own."""
    pixels = decode_picture(body, ImageClassificationSpec.model_validate(manifest.spec))
    labels = manifest.spec["labels"]
    expected = _run(model, pixels, manifest.normalisation)[0].softmax(dim=0)
    scores = {one["index"]: one["score"] for one in answer["predictions"]}
    found = torch.tensor([scores[index] for index in range(len(labels))])
    torch.testing.assert_close(found, expected, atol=SCORES, rtol=0)
    assert {one["label"] for one in answer["predictions"]} == set(labels)


def assert_mask(answer: dict[str, Any], model: nn.Module, body: bytes, manifest: Manifest) -> None:
    """Hold an answer to the module's own mask of a picture that has the shape of the program's input."""
    letter = decode_letter(body, ImageSegmentationSpec.model_validate(manifest.spec))
    assert letter.box == letter.pixels.shape[:2], "the picture fills its box"
    logits = _run(model, letter.pixels, manifest.normalisation)
    expected = F.interpolate(logits, letter.size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask"]["data"]))))
    assert (answer["height"], answer["width"]) == found.shape == letter.size
    assert (found == expected.numpy()).mean() >= PIXELS
    shares = {one["index"]: one["share"] for one in answer["classes"]}
    assert shares == {index: count / found.size for index, count in enumerate(np.bincount(found.ravel())) if count}
    assert {one["label"] for one in answer["classes"]} == {manifest.spec["labels"][index] for index in shares}


def _run(model: nn.Module, pixels: Pixels, normalisation: Normalisation) -> Tensor:
    mean, std = np.array(normalisation.mean), np.array(normalisation.std)
    image = torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)[None]  # (1, 3, Y, X)
    with torch.inference_mode():
        logits: Tensor = model(image)[0]
    return logits
