"""Writing a bundle: program, weights, golden vectors, model card, manifest; complete or not at all."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from export.image_classifier import ImageClassifierProgram
from export.model_card import render_model_card
from export.onnx_program import OPSET, export_onnx
from export.parity import BATCH_SIZES, measure_parity
from export.pictures import cut_crops, read_photos
from export.source import WEIGHTS, Source
from models.paca_vit import PaCaViTClassifier
from service.bundle import MANIFEST, Golden, Manifest, Parity, TensorSpec, hash_file, write_manifest
from service.runtimes.onnx import open_onnx
from service.tasks.image_classification import ImageClassificationSpec

PROGRAM = "model.onnx"
GOLDEN = "golden.npz"
CARD = "MODEL_CARD.md"
NUM_PARITY_PICTURES = 24
# Other processors order sums differently; a wrong weight or a wrong pixel is orders of magnitude above this.
ATOL, RTOL = 1e-4, 1e-3


def write_classifier_bundle(source: Source, model: nn.Module, out: Path) -> Manifest:
    """Write the bundle of an image classifier.

    Args:
        source: facts about the weights.
        model: with the weights; its first convolution is changed.
        out: the bundle's folder; replaced as a whole once the new one is complete.
    Returns: the manifest written.
    Raises: ValueError if the model is of a kind that has no program here, float16 does not hold its weights, or the
        program is not the model's equal.
    """
    if not isinstance(model, PaCaViTClassifier):
        raise ValueError(f"{type(model).__name__} has no image classification program; one of PaCaViTClassifier has")
    spec = ImageClassificationSpec.model_validate(source.spec)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        save_weights(model, folder / WEIGHTS)
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        program = ImageClassifierProgram(model, first, source.normalisation).eval()
        photos = read_photos(spec)
        with torch.inference_mode():
            expected = program(torch.from_numpy(photos))
        names = ["logits", *(f"clusters_stage{i + 1}" for i, c in enumerate(model.backbone.config.num_clusters) if c)]
        export_onnx(program, torch.from_numpy(photos[:1]), folder / PROGRAM, input_name="image", output_names=names)
        runtime = open_onnx(folder / PROGRAM, device="cpu")
        errors = measure_parity(program, runtime, cut_crops(spec, NUM_PARITY_PICTURES), output_names=names)
        runtime.close()
        golden = {f"output.{name}": tensor.numpy() for name, tensor in zip(names, expected, strict=True)}
        np.savez_compressed(folder / GOLDEN, **{"input.image": photos, **golden})
        fields = source.model_dump() | {
            "format_version": 1,
            "programs": {"onnx": PROGRAM},
            "opset": OPSET,
            "inputs": (TensorSpec(name="image", dtype="uint8", shape=("batch", spec.height, spec.width, 3)),),
            "outputs": tuple(
                TensorSpec(name=name, dtype="float32", shape=("batch", *tensor.shape[1:]))
                for name, tensor in zip(names, expected, strict=True)
            ),
            "golden": Golden(file=GOLDEN, atol=ATOL, rtol=RTOL),
            "parity": Parity(
                inputs=f"{NUM_PARITY_PICTURES} random crops of the photos in samples/",
                batch_sizes=BATCH_SIZES,
                max_relative_error=errors,
            ),
        }
        (folder / CARD).write_text(render_model_card(Manifest.model_validate(fields | {"files": _hashes(folder)})))
        manifest = Manifest.model_validate(fields | {"files": _hashes(folder)})
        write_manifest(folder, manifest)
        _move(folder, out)
    return manifest


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights as float16.

    Raises: ValueError naming a weight that float16 does not hold exactly.
    """
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    for name, weight in model.state_dict().items():
        if not torch.equal(weights[name].to(weight.dtype), weight):
            raise ValueError(f"{name} has values that float16 does not hold; round all weights before measuring them")
    path.write_bytes(save(weights))  # save_file would make a file that only its owner may read


def _move(folder: Path, out: Path) -> None:
    """Put a folder in the place of an older one, which moves to beside the folder; if that fails, it comes back."""
    old = folder.with_name(f"{out.name}.old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
