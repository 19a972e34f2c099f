from pathlib import Path

import pytest

from export.image_segmenter import plan_image_segmenter
from export.onnx_program import export_onnx
from export.parity import measure_parity
from service.runtimes.onnx import open_onnx
from service.tasks.image_segmentation import ImageSegmentationSpec
from tests.export.conftest import quiet_exporter
from tests.export.tiny_pictures import (
    HEIGHT,
    LABELS,
    SEGMENTERS,
    WIDTH,
    make_picture_model,
    make_picture_source,
)

GRID = (11, 15)
CLUSTERS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "paca": {"clusters_stage1": ("float32", (5, 165)), "clusters_stage2": ("float32", (4, 48))},
    "paca-fpn": {"clusters_stage1": ("float32", (5, 165)), "clusters_stage2": ("float32", (4, 48))},
    "tcformer": {"clusters_stage2": ("int32", (165,)), "clusters_stage3": ("int32", (165,))},
    "tcformer-v2-reconstruction": {"clusters_stage2": ("int32", (165,)), "clusters_stage3": ("int32", (165,))},
}


@pytest.mark.parametrize(
    "name",
    [
        "paca-fpn",
        "tcformer-v2-reconstruction",
        pytest.param("paca", marks=pytest.mark.slow),
        pytest.param("tcformer", marks=pytest.mark.slow),
    ],
)
def test_the_program_equals_the_module_at_other_batch_sizes(name: str, tmp_path: Path) -> None:
    plan = plan_image_segmenter(make_picture_source("image-segmentation"), make_picture_model(SEGMENTERS[name]))
    with quiet_exporter():
        export_onnx(plan, tmp_path / "model.onnx")
    parity = measure_parity(plan, open_onnx(tmp_path / "model.onnx", device="cpu"))  # refuses above 1e-5
    assert parity.batch_sizes == (1, 3, 8)
    assert set(parity.share_of_rows_off.values()) <= {0.0}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_logits_are_maps_and_clusters_are_what_the_backbone_gives(name: str) -> None:
    plan = plan_image_segmenter(make_picture_source("image-segmentation"), make_picture_model(SEGMENTERS[name]))
    assert [tensor.shape for tensor in plan.inputs] == [("batch", HEIGHT, WIDTH, 3)]
    logits, *clusters = plan.outputs
    assert (logits.name, logits.dtype, logits.shape) == ("logits", "float32", ("batch", len(LABELS), *GRID))
    assert {tensor.name: (tensor.dtype, tensor.shape[1:]) for tensor in clusters} == CLUSTERS[name]
    told = ImageSegmentationSpec.model_validate(plan.spec | {"fill": (0, 0, 0)}).explanation
    assert told is not None
    assert list(told.cluster_outputs) == list(CLUSTERS[name])
    assert len(plan.golden["image"]) == 1
    assert plan.golden_outputs == ("logits",), "cluster maps are large"
