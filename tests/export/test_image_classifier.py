import json
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest

from export.image_classifier import plan_image_classifier
from export.onnx_program import export_onnx
from export.parity import measure_parity
from models import density_peaks, token_exchange
from models.tcformer import TCFormerClassifier, TCFormerConfig
from service.runtimes.onnx import open_onnx
from service.sample import Arrays
from tests.export.conftest import quiet_exporter
from tests.export.tiny_pictures import CLASSIFIERS, LABELS, make_picture_model, make_picture_source

ONE_MERGE = TCFormerConfig(
    dims=(8, 16), num_heads=(1, 2), depths=(1, 1), mlp_ratios=(2, 2), reduction_ratios=(2, 1), sample_ratios=(0.25,)
)
CELLS, TOKENS = 11 * 15, 42  # a quarter of them, rounded up


@pytest.mark.parametrize("name", ["teacher", pytest.param("tcformer", marks=pytest.mark.slow)])
def test_the_program_equals_the_module_at_other_batch_sizes(name: str, tmp_path: Path) -> None:
    plan = plan_image_classifier(make_picture_source("image-classification"), make_picture_model(CLASSIFIERS[name]))
    with quiet_exporter():
        export_onnx(plan, tmp_path / "model.onnx")
    parity = measure_parity(plan, open_onnx(tmp_path / "model.onnx", device="cpu"))  # refuses above 1e-5
    assert parity.batch_sizes == (1, 3, 8)
    assert set(parity.share_of_rows_off.values()) <= {0.0}


def test_clusters_of_dynamic_tokens_are_the_token_of_each_cell_in_every_later_stage() -> None:
    plan = plan_image_classifier(
        make_picture_source("image-classification"), make_picture_model(CLASSIFIERS["tcformer"])
    )
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.outputs] == [
        ("logits", "float32", ("batch", len(LABELS))),
        ("clusters_stage2", "int32", ("batch", CELLS)),
        ("clusters_stage3", "int32", ("batch", CELLS)),
    ]
    found = plan.run(plan.golden)
    assert found["clusters_stage2"].dtype == "int32"
    assert {len(set(picture)) for picture in found["clusters_stage2"].tolist()} == {TOKENS}
    for finer, coarser in zip(found["clusters_stage2"].tolist(), found["clusters_stage3"].tolist(), strict=True):
        assert len(set(zip(finer, coarser, strict=True))) == TOKENS, "a token goes into one token"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_kind_of_classifier_is_planned(name: str) -> None:
    plan = plan_image_classifier(make_picture_source("image-classification"), make_picture_model(CLASSIFIERS[name]))
    assert plan.output_names[:1] == ("logits",)
    assert {array.shape for array in plan.run(plan.golden).values()} == {(3, *out.shape[1:]) for out in plan.outputs}


def test_clusters_that_are_decided_may_differ_a_little_and_others_not() -> None:
    source = make_picture_source("image-classification")
    allowed = {name: plan_image_classifier(source, make_picture_model(build)) for name, build in CLASSIFIERS.items()}
    assert {name: plan.max_share_off for name, plan in allowed.items()} == {
        "teacher": 0.0,
        "tcformer": 0.05,
        "tcformer-v2-reconstruction": 0.05,
    }


def test_a_program_that_compares_block_by_block_and_gathers_equals_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(density_peaks, "SPLIT_FROM", 100)
    monkeypatch.setattr(density_peaks, "MAX_PAIRS", 60 * CELLS)
    monkeypatch.setattr(token_exchange, "LINKS_PER_CELL", 0)
    model = make_picture_model(partial(TCFormerClassifier, ONE_MERGE))
    plan = plan_image_classifier(make_picture_source("image-classification"), model)
    with quiet_exporter():
        export_onnx(plan, tmp_path / "model.onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx")).graph
    shapes = [tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in graph.value_info]
    assert any(shape[1:] == (60, CELLS) for shape in shapes), "distances of a block of tokens"
    assert not any(shape.count(CELLS) > 1 for shape in shapes), "no matrix of all pairs"
    adding = {attribute.s for node in graph.node if node.op_type == "ScatterND" for attribute in node.attribute}
    assert adding == {b"add"}, "features are gathered and added row by row"
    runtime = open_onnx(tmp_path / "model.onnx", device="cpu")
    assert set(measure_parity(plan, runtime).share_of_rows_off.values()) <= {0.0}
    assert count_blocks_held(tmp_path, plan.golden, (60, CELLS)) == 1, "one block at a time"


def count_blocks_held(folder: Path, inputs: Arrays, shape: tuple[int, int]) -> int:
    """Most tensors of pairs (B, rows, columns) that ONNX Runtime holds at once, from the order in which it runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    session.run(["logits"], inputs)
    events = [e for e in json.loads(Path(session.end_profiling()).read_text()) if e["name"].endswith("_kernel_time")]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        tensors = {way: event["args"][f"{way}_type_shape"] for way in ("input", "output")}
        is_block = {way: any(tuple(*t.values())[1:] == shape for t in told) for way, told in tensors.items()}
        held += "MatMul" in event["args"]["op_name"] and is_block["output"]
        held -= event["args"]["op_name"] in {"ReduceMax", "ReduceMin"} and is_block["input"]
        most = max(most, held)
    assert held == 0, "all blocks are reduced"
    return most
