import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import clustering_claim
from benchmarks.clustering_claim import (
    ClaimPlan,
    make_plan,
    make_quick_plan,
    measure_claim,
    start_runs,
    take_models,
    train_in_turns,
)
from benchmarks.clustering_report import describe_claim, render_claim
from benchmarks.clustering_rows import Row
from models.clustered_attention import ClusteredAttentionConfig
from models.ctc_transformer import CtcTransformer
from service.bundle import Origin
from tests.training.tone_corpus import MODEL, PROBLEM, write_corpus
from training.handover import Start
from training.loop import Run

CONFIG = replace(MODEL, num_layers=3, dropout=0.1)
FULL = Row(name="full", num_layers=3)
IMPROVED = ClusteredAttentionConfig(num_clusters=4, top_k=4, bits=16, iterations=3)
ROWS = (
    FULL,
    Row(name="improved", num_layers=2, attention=IMPROVED),
    Row(name="improved, in place of full", num_layers=3, attention=IMPROVED, weights_of=FULL),
)
PLAN = ClaimPlan(
    recipe=replace(make_plan(epochs=2).recipe, problem=PROBLEM, batch_size=8),
    config=CONFIG,
    rows=ROWS,
    joined_seconds=4.0,
    min_tokens=50,
    rounds=1,
    num_examples=16,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads on small tensors mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tones"), 3)


def make_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return CtcTransformer(CONFIG, num_classes=len(PROBLEM.labels)).state_dict()


def make_runs(data: Path) -> dict[Row, Run]:
    examples = clustering_claim.take_first(PROBLEM.load(data), PLAN.num_examples)
    return start_runs(PLAN, make_state(), examples)


def test_an_interrupted_measurement_ends_with_the_weights_of_one_that_was_not(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_runs(data)
    seconds = train_in_turns(whole, tmp_path)
    assert all(run.step == 4 for run in whole.values())
    assert all(value > 0 for value in seconds.values())

    monkeypatch.setattr(clustering_claim, "CHECKPOINT_SECONDS", 0.0)
    folder = tmp_path / "interrupted"
    folder.mkdir()
    broken = make_runs(data)
    last = broken[ROWS[1]]
    advance = last.advance

    def stop_at_the_third() -> torch.Tensor:
        if last.step == 2:
            raise KeyboardInterrupt
        return advance()

    monkeypatch.setattr(last, "advance", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_in_turns(broken, folder)
    broken[FULL].save(folder / f"{FULL.key}.pt", seconds=0.1)  # a step ahead, as if stopped between two files
    resumed = make_runs(data)
    train_in_turns(resumed, folder)
    for row, run in whole.items():
        for name, weight in run.average.state_dict().items():
            torch.testing.assert_close(resumed[row].average.state_dict()[name], weight, atol=0, rtol=0)


def test_rows_learn_from_the_same_batches(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    forward = CtcTransformer.forward

    def remember(self: CtcTransformer, features: torch.Tensor, lengths: torch.Tensor) -> object:
        seen.setdefault(self.config.num_layers, []).append(features)
        return forward(self, features, lengths)

    monkeypatch.setattr(CtcTransformer, "forward", remember)
    train_in_turns(make_runs(data), tmp_path)
    assert len(seen[3]) == len(seen[2]) == 4
    for first, second in zip(seen[3], seen[2], strict=True):
        assert torch.equal(first, second)


def test_a_row_in_place_of_full_runs_the_weights_that_were_trained_with_it(data: Path, tmp_path: Path) -> None:
    runs = make_runs(data)
    train_in_turns(runs, tmp_path)
    models = take_models(PLAN, runs)
    trained, start = models[FULL].state_dict(), make_state()
    weights = models[ROWS[2]].state_dict()
    assert any(name.endswith("planes") for name in weights)
    assert all(torch.equal(weights[name], weight) for name, weight in trained.items())
    assert not torch.equal(trained["head.weight"], start["head.weight"])


@pytest.mark.parametrize(
    ("change", "least"),
    [({"min_tokens": 1000}, 1000), ({"rows": (replace(FULL, attention=replace(IMPROVED, num_clusters=100)),)}, 800)],
)
def test_recordings_too_short_to_tell_anything_are_refused(
    change: dict[str, object], least: int, data: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(make_state(), weights)
    with pytest.raises(ValueError, match=f"at least {least} are needed"):
        measure_claim(replace(PLAN, **change), weights=weights, data=data, work=tmp_path)


def test_the_plan_is_that_of_the_shipped_recogniser_on_long_recordings() -> None:
    plan, quick = make_plan(epochs=3), make_quick_plan()
    assert plan.problem.join_sizes == (8, 22)
    assert plan.recipe.epochs == 3
    assert quick.num_examples == 2 * quick.recipe.batch_size


class Torch:
    """Runs a model without exporting it."""

    def __init__(self, model: CtcTransformer) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        log_probs, _ = self.model(*(torch.from_numpy(inputs[name]) for name in ("features", "lengths")))
        return {"log_probs": log_probs.numpy()}


def test_every_row_is_measured_and_a_second_call_does_not_train_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(make_state(), weights)
    monkeypatch.setattr(clustering_claim, "build_native", lambda: None)
    monkeypatch.setattr(clustering_claim, "open_program", lambda model, *_, native_library: Torch(model))
    claim = measure_claim(PLAN, weights=weights, data=data, work=tmp_path / "work")
    assert [finding.row for finding in claim.findings] == list(ROWS)
    first, fewer, in_place = claim.findings
    assert (claim.num_steps, claim.steps_per_epoch) == (4, 2)
    assert first.to_first == 1.0
    assert first.epoch_seconds
    assert in_place.epoch_seconds is None
    assert fewer.num_parameters < first.num_parameters == in_place.num_parameters
    said = sum(len(text.split()) for text in PROBLEM.read(data, "test_dev").texts)
    for finding in claim.findings:
        assert finding.seconds > 0
        assert finding.errors["greedy"]["test_dev"].num_said == said
        assert "default" not in finding.errors  # a problem without words

    def refuse(self: Run) -> torch.Tensor:
        raise AssertionError("trained again")

    monkeypatch.setattr(Run, "advance", refuse)
    again = measure_claim(PLAN, weights=weights, data=data, work=tmp_path / "work")
    assert [finding.errors for finding in again.findings] == [finding.errors for finding in claim.findings]

    origin = Origin(
        architecture="a", command="c", seed=1, minutes=1.0, hardware="h", recipe="r", data="d", data_license="l"
    )
    start = Start(tmp_path, "tones", "1.0.0", origin)
    text = render_claim(claim, PLAN, start)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(ROWS)
    assert len({line.count("|") for line in table}) == 1
    assert "tones 1.0.0" in text
    described = json.loads(json.dumps(describe_claim(claim, PLAN, start)))
    assert described["rows"][0]["errors"]["greedy"]["test_dev"]["num_said"] == said
    assert [row["row"] for row in described["rows"]] == [row.key for row in ROWS]
