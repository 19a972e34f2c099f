"""The native operator in ONNX Runtime sessions, and inputs for it."""

import platform
import shutil
from functools import cache
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from torch import from_numpy
from torch.testing import assert_close

from export.build_native import build_native
from service.sample import Arrays
from tests.golden_files import REPOSITORY
from tests.oracles.native_operator import clustered_attention_operator

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux" or platform.machine() not in {"x86_64", "aarch64"},
    reason="needs g++ on Linux, x86-64 or 64-bit ARM",
)
DOMAIN = "clustered_attention"
TIERS: dict[str, set[str]] = {  # what each needs, as Linux calls it
    "baseline": set(),
    "avx2": {"avx2", "fma", "bmi2", "popcnt"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vpopcntdq", "fma", "bmi2", "popcnt"},
}
OUTPUTS = ["out", "clusters"]
TOLERANCE = 1e-5  # of float32 sums over some hundred keys, in another order than the oracle's
DEFAULTS: dict[str, Any] = {
    "num_clusters": 7,
    "num_iterations": 4,
    "top_k": 5,
    "scale": 0.3,
    "metric": "lsh",
    "full_below": 0,
}


def supported_tiers() -> list[str]:
    """Tiers of this processor, the best last."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return [name for name, needed in TIERS.items() if needed <= flags]


on_each_tier = pytest.mark.parametrize(
    "tier",
    [
        pytest.param(
            f"{DOMAIN}.{name}",
            id=name,
            marks=pytest.mark.skipif(name not in supported_tiers(), reason=f"this processor has no {name}"),
        )
        for name in TIERS
    ],
)


@cache
def library() -> Path:
    """The kernel; with checks of memory in a process that can load them, see `make native-sanitize`."""
    return build_native(REPOSITORY / "build" / "native", sanitize="libasan" in environ.get("LD_PRELOAD", ""))


def run(
    inputs: Arrays, *, domain: str = DOMAIN, num_threads: int = 1, **settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Run the operator with settings that differ from the defaults."""
    session = open_session(make_model(DEFAULTS | settings, domain), num_threads=num_threads)
    out, clusters = session.run(OUTPUTS, inputs)
    return out, clusters


def make_model(
    attributes: dict[str, Any], domain: str = DOMAIN, *, ranks: tuple[int, ...] = (4, 4, 4, 2, 1, 1)
) -> bytes:
    """A program of the one node."""
    names = ("q", "k", "v", "planes", "query_lengths", "key_lengths")
    types = [TensorProto.FLOAT] * 4 + [TensorProto.INT64] * 2
    inputs = [
        helper.make_tensor_value_info(name, type_, [None] * rank)
        for name, type_, rank in zip(names, types, ranks, strict=True)
    ]
    outputs = [
        helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * 4),
        helper.make_tensor_value_info("clusters", TensorProto.INT32, [None] * 3),
    ]
    node = helper.make_node("ClusteredAttention", names, OUTPUTS, domain=domain, **attributes)
    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    model: bytes = helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()
    return model


def open_session(model: bytes, *, num_threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # a refused node is also raised
    options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def make_inputs(
    sizes: tuple[int, ...], query_lengths: list[int] | None, key_lengths: list[int] | None, *, seed: int = 0
) -> Arrays:
    """Normal numbers; NaN behind the lengths; hash planes that no query is near to."""
    B, H, N, S, E, D, P = sizes
    random = np.random.default_rng(seed)
    q, k, v, planes = (
        random.standard_normal(shape).astype(np.float32)
        for shape in ((B, H, N, E), (B, H, S, E), (B, H, S, D), (P, E + 1))
    )
    projections = np.sort(q.reshape(B * H * N, E).astype(np.float64) @ planes[:, :-1].T.astype(np.float64), axis=0)
    middle = projections[len(projections) // 4 : -(len(projections) // 4) or None]
    if len(middle) > 1:  # the widest gap between projections, so that rounding decides no bit
        widest = np.diff(middle, axis=0).argmax(axis=0)[None]
        planes[:, -1] = ((np.take_along_axis(middle, widest, 0) + np.take_along_axis(middle, widest + 1, 0)) / 2)[0]
    lengths = {"query_lengths": query_lengths or [N] * B, "key_lengths": key_lengths or [S] * B}
    for b in range(B):
        q[b, :, lengths["query_lengths"][b] :] = np.nan
        k[b, :, lengths["key_lengths"][b] :] = np.nan
        v[b, :, lengths["key_lengths"][b] :] = np.nan
    return {"q": q, "k": k, "v": v, "planes": planes} | {name: np.array(x, np.int64) for name, x in lengths.items()}


def expect(inputs: Arrays, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the oracle answers."""
    arguments: dict[str, Any] = {**inputs, **DEFAULTS, **settings}
    return clustered_attention_operator(**arguments)


def check_equals_oracle(found: tuple[np.ndarray, np.ndarray], inputs: Arrays, **settings: Any) -> None:
    out, clusters = expect(inputs, **settings)
    assert found[0].dtype == np.float32
    assert found[1].dtype == np.int32
    np.testing.assert_array_equal(found[1], clusters)
    assert_close(from_numpy(found[0]).double(), from_numpy(out), atol=TOLERANCE, rtol=0)
