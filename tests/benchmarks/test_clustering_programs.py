from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import clustering_programs
from benchmarks.clustering_programs import open_program, time_in_turns
from benchmarks.clustering_rows import Row
from models.clustered_attention import ClusteredAttentionConfig
from models.ctc_transformer import CtcTransformer
from tests.export.conftest import quiet_exporter
from tests.export.native_operator import NEEDS_COMPILER, library
from tests.training.tone_corpus import MODEL, PROBLEM
from training.speech_recognition import Utterances

CLUSTERED = replace(MODEL, attention=ClusteredAttentionConfig(num_clusters=4, top_k=4, bits=16, iterations=3))


@NEEDS_COMPILER
def test_the_program_computes_what_the_model_does_and_is_exported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = CtcTransformer(CLUSTERED, num_classes=len(PROBLEM.labels)).eval()
    path = tmp_path / "clustered.onnx"
    with quiet_exporter():
        program = open_program(model, PROBLEM, path, native_library=library())
    assert program.kernel == "native"
    features = torch.randn(1, 90, CLUSTERED.num_mels, generator=torch.Generator().manual_seed(1)) * 4 - 4
    lengths = torch.tensor([90])
    inputs = {"features": features.numpy(), "lengths": lengths.numpy()}
    with torch.inference_mode():
        expected, _ = model(PROBLEM.normalise(features), lengths)
    found = torch.from_numpy(program.run(inputs, ["log_probs"])["log_probs"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    monkeypatch.setattr(clustering_programs, "export_onnx", None)  # not called: the file is there
    again = open_program(model, PROBLEM, path, native_library=library()).run(inputs, ["log_probs"])["log_probs"]
    torch.testing.assert_close(torch.from_numpy(again), found, atol=0, rtol=0)


class Fake:
    """Remembers when it was called."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        self.calls.append(f"{self.name} {inputs['features'].shape} {inputs['lengths'].tolist()} {outputs}")
        return {}


def test_programs_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    rows = [Row(name=name, num_layers=4) for name in ("full", "improved")]
    recording = Utterances([[torch.zeros(50, 20)]], [torch.empty(0)], ["A"], [0.5])
    found = time_in_turns({row: Fake(row.name, calls) for row in rows}, recording, rounds=2)
    one = [f"{row.name} (1, 50, 20) [50] ['log_probs']" for row in rows]
    assert calls == 3 * one
    assert [list(seconds) for seconds in found] == [rows, rows]
