from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from export.bundles import PROGRAM
from export.image_classifier import ImageClassifierProgram
from export.parity import BATCH_SIZES, MAX_RELATIVE_ERROR, measure_parity, relative_error
from export.pictures import cut_crops
from export.source import read_source
from service.runtimes.onnx import OnnxRuntime, open_onnx
from service.sample import Arrays
from service.tasks.image_classification import ImageClassificationSpec

NAMES = ["logits", "clusters_stage1"]


@pytest.fixture(scope="module")
def runtime(bundle_folder: Path) -> OnnxRuntime:
    return open_onnx(bundle_folder / PROGRAM, device="cpu")


@pytest.fixture
def program(bundle_folder: Path) -> ImageClassifierProgram:
    source, model = read_source(bundle_folder)
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    return ImageClassifierProgram(model, first, source.normalisation).eval()


@pytest.fixture
def images(bundle_folder: Path) -> np.ndarray:
    return cut_crops(ImageClassificationSpec.model_validate(read_source(bundle_folder)[0].spec), 8)


class SpoiledRuntime:
    """Spoils the outputs of another."""

    name, version, device, kernel, num_streams = "spoiled", "1", "cpu", "portable", 1

    def __init__(self, runtime: OnnxRuntime, spoil: Callable[[Arrays], Arrays]) -> None:
        self.runtime, self.spoil = runtime, spoil

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        return self.spoil(self.runtime.run(inputs, outputs))

    def close(self) -> None:
        pass


def spoil_one(value: float, size: int) -> Callable[[Arrays], Arrays]:
    """Puts a value into one row of the batches of one size."""

    def spoil(found: Arrays) -> Arrays:
        if len(found["logits"]) == size:
            found["logits"][-1, 0] = value
        return found

    return spoil


def test_parity_is_measured_for_every_output(
    program: ImageClassifierProgram, runtime: OnnxRuntime, images: np.ndarray
) -> None:
    errors = measure_parity(program, runtime, images, output_names=NAMES)
    assert list(errors) == NAMES
    assert all(0 <= error <= MAX_RELATIVE_ERROR for error in errors.values())


@torch.no_grad()
def test_a_module_with_one_other_weight_is_refused(
    program: ImageClassifierProgram, runtime: OnnxRuntime, images: np.ndarray
) -> None:
    program.model.head.bias[0] += 1e-2
    with pytest.raises(ValueError, match=r"program and module differ by .* in logits; allowed is 1e-05"):
        measure_parity(program, runtime, images, output_names=NAMES)


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("value", [1e6, np.nan, np.inf])
def test_one_wrong_row_in_one_batch_is_refused(
    program: ImageClassifierProgram, runtime: OnnxRuntime, images: np.ndarray, size: int, value: float
) -> None:
    spoiled = SpoiledRuntime(runtime, spoil_one(value, size))
    with pytest.raises(ValueError, match="in logits"):
        measure_parity(program, spoiled, images, output_names=NAMES)


def test_an_output_of_another_shape_is_refused(
    program: ImageClassifierProgram, runtime: OnnxRuntime, images: np.ndarray
) -> None:
    spoiled = SpoiledRuntime(runtime, lambda found: found | {"logits": found["logits"][:, :-1]})
    with pytest.raises(ValueError, match=r"shape \(1, 4\), expected \(1, 5\)"):
        measure_parity(program, spoiled, images, output_names=NAMES)


def test_the_error_is_relative_to_the_largest_magnitude() -> None:
    expected = np.array([1.0, -4.0, 2.0], np.float32)
    assert relative_error(expected + np.array([0, 0, 0.5], np.float32), expected) == 0.125
