import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_contestants import COMPILED, EAGER, choose_bundles, open_contestant
from service.bundle import open_bundle
from tests.service.tiny_bundle import reseal

BUNDLE = Path("bundles/thc-aal116-abide")


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, ...]:
    """The same weights in three folders: as shipped, with one more program, in another precision."""
    folders = tuple(tmp_path / name / BUNDLE.name for name in ("bundles", "programs", "fp16"))
    for folder in folders:
        shutil.copytree(BUNDLE, folder)
    shutil.copy(BUNDLE / "model.onnx", folders[1] / "model.pt")
    reseal(folders[1], programs={"onnx": "model.onnx", "torchscript": "model.pt"})
    reseal(folders[2], precision="fp16")
    return tuple(folder.parent for folder in folders)


def test_of_the_same_weights_and_precision_the_bundle_with_most_programs_is_measured(roots: tuple[Path, ...]) -> None:
    for order in (roots, roots[::-1]):
        chosen = {bundle.folder.parent for bundle in choose_bundles((*order, Path("absent")))}
        assert chosen == {roots[1], roots[2]}


def test_every_shipped_bundle_takes_part() -> None:
    assert BUNDLE in {bundle.folder for bundle in choose_bundles(gpu.FP32_ROOTS[:1])}
    assert len(choose_bundles(gpu.FP32_ROOTS[:1])) == len(list(Path("bundles").glob("*/manifest.json")))


def test_the_eager_module_computes_in_the_precision_of_the_bundle(roots: tuple[Path, ...]) -> None:
    logits = []
    for root in roots[1:]:
        bundle = open_bundle(root / BUNDLE.name)
        with open_contestant(bundle, EAGER, "cpu", cache=root) as runtime:
            assert (runtime.name, runtime.device) == (EAGER, "cpu")
            logits.append(runtime.run(bundle.read_golden()[0], ("logits",))["logits"])
    assert 1e-6 < np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max() < 1e-2  # export.md's bound for float16


def test_the_compiled_program_is_a_contestant() -> None:
    assert gpu.Plan().contestants == ("onnx", "torchscript", COMPILED, EAGER)
