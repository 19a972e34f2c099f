"""Rows of the comparison as they would be served: ONNX programs with the native kernel, timed in turns."""

import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.clustering_rows import Row
from export.onnx_program import export_onnx
from export.plan import EXPORT_BATCH, Plan
from export.speech_recognizer import EXPORT_FRAMES, SpeechRecognizerProgram
from models.ctc_transformer import CtcTransformer
from service.bundle import Normalisation, TensorSpec
from service.runtimes.onnx import OnnxRuntime, open_onnx
from training.speech_recognition import SpeechRecognition, Utterances


def open_program(model: nn.Module, problem: SpeechRecognition, path: Path, *, native_library: Path) -> OnnxRuntime:
    """Open a recogniser's program, exported first if the file is not there.

    Args:
        model: in evaluation mode.
        problem: what it was trained on.
        path: of the program.
        native_library: of the kernel of clustered attention.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        export_onnx(_plan_program(model, problem), partial)
        partial.replace(path)
    return open_onnx(path, device="cpu", native_library=native_library)


def time_in_turns(programs: Mapping[Row, OnnxRuntime], recording: Utterances, *, rounds: int) -> list[dict[Row, float]]:
    """Measure the CPU seconds of one recording in every program once a round, after a round that does not count.

    Args:
        programs: in the order of their turns.
        recording: one, its features not normalised.
        rounds: that count.
    """
    (speeds,) = recording.features
    inputs = {"features": speeds[0].numpy()[None], "lengths": np.array([len(speeds[0])])}
    found: list[dict[Row, float]] = []
    for _ in range(rounds + 1):
        seconds = {}
        for row, program in programs.items():
            before = time.process_time()
            program.run(inputs, ["log_probs"])
            seconds[row] = time.process_time() - before
        found.append(seconds)
    return found[1:]


def _plan_program(model: nn.Module, problem: SpeechRecognition) -> Plan:
    """Plan the program alone: what else a bundle needs is left empty."""
    assert isinstance(model, CtcTransformer)
    num_mels, num_labels = model.config.num_mels, len(problem.labels)
    clusters = TensorSpec(name="clusters", dtype="int32", shape=("batch", "layers", "heads", "tokens"))
    log_probs = TensorSpec(name="log_probs", dtype="float32", shape=("batch", "tokens", num_labels))
    normalisation = Normalisation(mean=(problem.mean,), std=(problem.std,))
    return Plan(
        program=SpeechRecognizerProgram(deepcopy(model), normalisation).eval(),
        spec={},
        inputs=(
            TensorSpec(name="features", dtype="float32", shape=("batch", "frames", num_mels)),
            TensorSpec(name="lengths", dtype="int64", shape=("batch",)),
        ),
        outputs=(log_probs, clusters) if model.config.attention else (log_probs,),
        example={
            "features": np.zeros((EXPORT_BATCH, EXPORT_FRAMES, num_mels), np.float32),
            "lengths": np.full(EXPORT_BATCH, EXPORT_FRAMES, np.int64),
        },
        golden={},
        parity_inputs="",
        parity_batches=(),
    )
