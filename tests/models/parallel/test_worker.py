"""The processes that the service starts, with a small model of random weights."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.speech_recognizer import SpeechRecognizerProgram
from models import BUILDERS
from models.clustered_attention import ALONE
from models.ctc_transformer import CtcTransformer
from service.bundle import Normalisation
from service.runtimes.rank_group import GroupLost, RankGroup
from service.sample import Arrays

ARCHITECTURE, NUM_CLASSES, NUM_BANDS = "ctc-transformer-micro", 5, 40
NORMALISATION = Normalisation(mean=(-0.5,), std=(2.0,))
OUTPUTS = ("log_probs", "clusters")
LENGTHS = (200, 701)  # frames; the first sample attends in full
ATOL = 1e-4  # of the issue: parity with the ordinary program
MAX_SHARE_OFF = 0.05  # a near tie may fall differently, as in an export


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = BUILDERS[ARCHITECTURE](num_classes=NUM_CLASSES)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file({name: weight.half() for name, weight in model.state_dict().items()}, path)
    return path


@contextmanager
def start_group(weights: Path, *, num_ranks: int, **changes: Any) -> Iterator[RankGroup]:
    opening = {
        "architecture": ARCHITECTURE,
        "num_classes": NUM_CLASSES,
        "weights": str(weights),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "mean": NORMALISATION.mean,
        "std": NORMALISATION.std,
        "device": "cpu",
        "num_threads": 1,
        "timeout_seconds": 120.0,
    }
    group = RankGroup(opening | changes, num_ranks=num_ranks, timeout_seconds=120.0)
    try:
        yield group
    finally:
        group.close()


@pytest.fixture(scope="module")
def inputs() -> Arrays:
    features = np.random.default_rng(2).normal(size=(2, LENGTHS[1], NUM_BANDS)).astype(np.float32)
    features[0, LENGTHS[0] :] = 0
    return {"features": features, "lengths": np.array(LENGTHS)}


@pytest.fixture(scope="module")
def expected(weights: Path, inputs: Arrays) -> Arrays:
    """The module that is exported, in one process."""
    torch.manual_seed(5)
    model = BUILDERS[ARCHITECTURE](num_classes=NUM_CLASSES).half().float()
    assert isinstance(model, CtcTransformer)
    with torch.inference_mode():
        program = SpeechRecognizerProgram(model, NORMALISATION).eval()
        found = program(torch.from_numpy(inputs["features"]), torch.from_numpy(inputs["lengths"]))
    return {name: x.numpy() for name, x in zip(OUTPUTS, found, strict=True)}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_any_number_of_ranks_answers_as_the_program_does(
    weights: Path, inputs: Arrays, expected: Arrays, num_ranks: int
) -> None:
    with start_group(weights, num_ranks=num_ranks) as group:
        found, costs = group.run(inputs, OUTPUTS)
        again, _ = group.run(inputs, OUTPUTS[:1])
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        off = np.abs(found[name].astype(np.float64) - array) > ATOL
        assert off.mean() <= MAX_SHARE_OFF, name
    assert set(np.unique(expected["clusters"][0, :, :, :100])) == {ALONE}
    np.testing.assert_array_equal(found["clusters"][0], expected["clusters"][0])
    assert again.keys() == {"log_probs"}
    np.testing.assert_array_equal(again["log_probs"], found["log_probs"])
    assert len(costs) == num_ranks
    assert all((cost.sent_bytes > 0) == (num_ranks > 1) for cost in costs)
    assert all(0 <= cost.waiting_seconds < cost.seconds for cost in costs)


def test_where_the_ranks_meet_nobody_else_does(weights: Path) -> None:
    with start_group(weights, num_ranks=2) as group:
        environment = Path(f"/proc/{group.processes[0].pid}/environ").read_bytes().split(b"\0")
        port = next(int(one.removeprefix(b"MASTER_PORT=")) for one in environment if one.startswith(b"MASTER_PORT="))
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
        listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]  # proc(5): LISTEN
    assert listening == [f"0100007F:{port:04X}"], "on 127.0.0.1 alone"


def test_weights_that_are_not_those_meant_are_refused(weights: Path) -> None:
    with (
        pytest.raises(GroupLost, match="expected 0000; export the bundle again"),
        start_group(weights, num_ranks=1, sha256="0000"),
    ):
        pass


def test_a_rank_ends_when_the_service_does(weights: Path) -> None:
    with start_group(weights, num_ranks=1) as group:
        (process,) = group.processes
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
