"""The paper's claim on real speech: word errors and cost of a recogniser with full and with clustered attention.

Every row (`clustering_rows`) starts from the same trained weights and gets the same few steps on joined recordings with
its own attention: the same batches, augmentation, dropout and schedule. Rows take turns, step by step in training and
recording by recording in inference, so that whatever else the machine does meets all of them. Training from scratch
would need hours for all rows, so what is measured is how well a trained model gets along with each attention.

Source: Vyas et al. 2020, section 4, where models are trained from scratch.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.clustering_programs import open_program, time_in_turns
from benchmarks.clustering_recordings import count_tokens, count_word_errors, join_recordings, take_first
from benchmarks.clustering_rows import ROWS, AttentionCost, Row, count_attention, make_model
from export.build_native import build_native
from models.ctc_transformer import CTC_TRANSFORMER_SMALL, CtcTransformerConfig
from training.error_rate import ErrorCount
from training.loop import CHECKPOINT_SECONDS, Run
from training.recipe import Recipe
from training.recipes.ctc_transformer_small_an4 import RECIPE
from training.speech_recognition import SpeechRecognition, Utterances

SPLITS = ("valid", "test_dev")
JOINED_SECONDS = 45.0  # about; what is asked for is 30 to 60
MIN_TOKENS = 1000
TOKENS_PER_CLUSTER = 8  # at least: with fewer, clustering would have little to save


@dataclass(frozen=True, kw_only=True)
class ClaimPlan:
    """How much to do.

    Attributes:
        recipe: how every trained row goes on; its problem is speech recognition, its model is not looked at.
        config: of the models, but for depth and attention.
        rows: of the table; the first is what the others are compared with.
        joined_seconds: of the recordings that are measured, about.
        min_tokens: that each of them has at least.
        rounds: of inference.
        num_examples: of the training split; None takes all.
    """

    recipe: Recipe
    config: CtcTransformerConfig
    rows: tuple[Row, ...] = ROWS
    joined_seconds: float = JOINED_SECONDS
    min_tokens: int = MIN_TOKENS
    rounds: int = 5
    num_examples: int | None = None

    @property
    def problem(self) -> SpeechRecognition:
        """The recipe's, known to be about speech."""
        assert isinstance(self.recipe.problem, SpeechRecognition)
        return self.recipe.problem


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was measured of one row.

    Attributes:
        row: which.
        num_parameters: of the model.
        errors: way of decoding → split → word errors; "greedy" is without search and words, "default" what the service
            does, left out where that is the same.
        epoch_seconds: CPU time of training for one pass over the training split; None where it was not trained.
        seconds: CPU time of the exported program for one recording, median over rounds.
        to_first: that time over the first row's in the same round, median.
        cost: of attention in that recording.
    """

    row: Row
    num_parameters: int
    errors: dict[str, dict[str, ErrorCount]]
    epoch_seconds: float | None
    seconds: float
    to_first: float
    cost: AttentionCost


@dataclass(frozen=True, kw_only=True)
class Claim:
    """All that was measured.

    Attributes:
        findings: in the order of the rows.
        recordings: split → seconds of each joined recording.
        num_tokens: of the recording that inference was timed with.
        num_steps, steps_per_epoch: of training, for every trained row.
    """

    findings: list[Finding]
    recordings: dict[str, list[float]]
    num_tokens: int
    num_steps: int
    steps_per_epoch: int


def make_plan(*, epochs: int) -> ClaimPlan:
    """Plan so many epochs for each trained row on CMU AN4."""
    assert isinstance(RECIPE.problem, SpeechRecognition)
    recipe = replace(
        RECIPE,
        problem=replace(RECIPE.problem, join_sizes=(8, 22)),
        epochs=epochs,
        ema_decay=0.9,  # of few steps: a slower average would still be the weights of the start
    )
    return ClaimPlan(recipe=recipe, config=CTC_TRANSFORMER_SMALL)


def make_quick_plan() -> ClaimPlan:
    """Plan two steps for each trained row: the figures mean nothing but that it runs."""
    plan = make_plan(epochs=1)
    return replace(plan, rounds=1, num_examples=2 * plan.recipe.batch_size)


def measure_claim(plan: ClaimPlan, *, weights: Path, data: Path, work: Path) -> Claim:
    """Train and measure all rows; goes on where an interrupted call with the same plan and weights stopped.

    Args:
        plan: what to do.
        weights: safetensors that all rows start from.
        data: folder of all data sets.
        work: folder for checkpoints and counted errors, which stay there.
    Raises: ValueError if the weights do not fit, or a recording is too short for the plan; RuntimeError if the native
        kernel cannot be built.
    """
    work /= _digest(plan, weights)
    work.mkdir(parents=True, exist_ok=True)
    recordings = {
        split: join_recordings(plan.problem.read(data, split), seconds=plan.joined_seconds) for split in SPLITS
    }
    check_lengths(plan, recordings)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other would count as CPU time
    try:
        state = load_file(weights)
        runs = start_runs(plan, state, take_first(plan.problem.load(data), plan.num_examples))
        spent = train_in_turns(runs, work)
        models = take_models(plan, runs)
        errors = {row: count_once(plan, models[row], recordings, data, work / f"{row.key}.json") for row in plan.rows}
        timed = take_first(recordings["test_dev"], 1)
        library = build_native()
        programs = {
            row: open_program(model, plan.problem, work / f"{row.key}.onnx", native_library=library)
            for row, model in models.items()
        }
        rounds = time_in_turns(programs, timed, rounds=plan.rounds)
    finally:
        torch.set_num_threads(num_threads)
    (num_tokens,) = count_tokens(plan.problem, timed)
    run = runs[plan.rows[0]]
    findings = [
        Finding(
            row=row,
            num_parameters=sum(parameter.numel() for parameter in models[row].parameters()),
            errors=errors[row],
            epoch_seconds=spent[row] / run.num_steps * run.steps_per_epoch if row in spent else None,
            seconds=median(seconds[row] for seconds in rounds),
            to_first=median(seconds[row] / seconds[plan.rows[0]] for seconds in rounds),
            cost=count_attention(replace(plan.config, num_layers=row.num_layers, attention=row.attention), num_tokens),
        )
        for row in plan.rows
    ]
    return Claim(
        findings=findings,
        recordings={split: joined.seconds for split, joined in recordings.items()},
        num_tokens=num_tokens,
        num_steps=run.num_steps,
        steps_per_epoch=run.steps_per_epoch,
    )


def check_lengths(plan: ClaimPlan, recordings: Mapping[str, Utterances]) -> None:
    """Refuse recordings too short to tell anything about clustering.

    Raises: ValueError naming the shortest.
    """
    most = max((row.attention.num_clusters for row in plan.rows if row.attention), default=0)
    least = max(plan.min_tokens, TOKENS_PER_CLUSTER * most)
    for split, joined in recordings.items():
        shortest = min(count_tokens(plan.problem, joined))
        if shortest < least:
            raise ValueError(f"a recording of {split} has {shortest} tokens; at least {least} are needed; join more")


def start_runs(plan: ClaimPlan, state: Mapping[str, Tensor], examples: Utterances) -> dict[Row, Run]:
    """Begin the run of each row that is trained.

    Raises: ValueError if the weights do not fit.
    """
    return {
        row: Run(plan.recipe, examples, device=torch.device("cpu"), model=make_model(row, plan.config, state))
        for row in plan.rows
        if row.weights_of is None
    }


def train_in_turns(runs: Mapping[Row, Run], work: Path) -> dict[Row, float]:
    """Take all runs to their ends, one step of each after the other, going on from checkpoints in the work folder.

    Returns: CPU seconds of each, those before an interruption included.
    Raises: FloatingPointError if a loss is not finite; the checkpoints before that are kept.
    """
    paths = {row: work / f"{row.key}.pt" for row in runs}
    spent = {row: run.resume(paths[row]) if paths[row].exists() else 0.0 for row, run in runs.items()}
    num_steps = max(run.num_steps for run in runs.values())
    first = min(run.step for run in runs.values())
    saved = time.monotonic()
    for step in tqdm(range(first, num_steps), unit="step of each", mininterval=5.0, dynamic_ncols=True):
        for row, run in runs.items():
            if run.step > step:
                continue  # its checkpoint was written when those of others were not yet
            torch.manual_seed(run.recipe.seed * 100_003 + step)  # of dropout: the same in every row
            before = time.process_time()
            loss = run.advance().item()
            spent[row] += time.process_time() - before
            if not math.isfinite(loss):
                raise FloatingPointError(f"{row.key}: the loss is {loss} at step {step}; it should be finite")
        if step + 1 == num_steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
            for row, run in runs.items():
                run.save(paths[row], seconds=spent[row])
            saved = time.monotonic()
    return spent


def take_models(plan: ClaimPlan, runs: Mapping[Row, Run]) -> dict[Row, nn.Module]:
    """Take the averaged weights of all runs, and put those that other rows use into their models."""
    models: dict[Row, nn.Module] = {row: run.average.module.eval() for row, run in runs.items()}
    return {
        row: models[row]
        if row.weights_of is None
        else make_model(row, plan.config, models[row.weights_of].state_dict()).eval()
        for row in plan.rows
    }


def count_once(
    plan: ClaimPlan, model: nn.Module, recordings: Mapping[str, Utterances], data: Path, path: Path
) -> dict[str, dict[str, ErrorCount]]:
    """Count a row's word errors, or read them where they were counted before; see `Finding.errors`."""
    if not path.exists():
        spec = plan.problem.make_spec(data)
        widths = {"greedy": 1, "default": None} if spec.beam_width > 1 else {"greedy": 1}
        found: dict[str, dict[str, ErrorCount]] = {way: {} for way in widths}
        for split, joined in recordings.items():
            log_probs = plan.problem.recognise(model, joined)
            for way, width in widths.items():
                found[way][split] = count_word_errors(plan.problem, log_probs, joined, spec, beam_width=width)
        path.write_text(json.dumps(found))
    read = json.loads(path.read_text())
    return {way: {split: ErrorCount(*count) for split, count in counts.items()} for way, counts in read.items()}


def _digest(plan: ClaimPlan, weights: Path) -> str:
    """Name of the work folder: what was trained otherwise, or from other weights, is not gone on with."""
    told = repr(replace(plan, rounds=0)).encode()
    return hashlib.sha256(told + weights.read_bytes()).hexdigest()[:16]
