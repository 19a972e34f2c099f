"""The claim's measurement as a table in Markdown and as JSON."""

from dataclasses import asdict
from typing import Any

from benchmarks.clustering_claim import SPLITS, Claim, ClaimPlan, Finding
from training.handover import Start

_METHOD = """Every row starts from the same trained weights ({start}); rows with fewer layers take some of its
layers, evenly spread. Each row but those "in place of full" is then trained for the same {num_steps} steps (epochs:
{epochs}, of {steps_per_epoch} steps) with its own attention, on the same batches of joined recordings with the same
augmentation, dropout and learning rates; the averaged weights are measured. Rows "in place of full" run the weights of
the row with full attention and as many layers, untrained. No attention falls back to full for short recordings.

Word errors are those of joined utterances of several speakers: {recordings}.
Nothing was chosen on test_dev. One word is {resolution:.2f} points of test_dev: a few words more or less mean nothing.

Training: CPU-seconds of torch for one epoch, a step of each row in turn, one thread. Inference: CPU-ms of the whole
exported program in ONNX Runtime, with the native kernel, one thread, for one recording of {num_tokens} tokens; rows in
turn, medians of {rounds} rounds. Attention: multiply-adds of all layers for that recording by the formula of
`benchmarks/clustering_rows.py`, projections left out, and Hamming distances between words of {bits} bits."""

_HEAD = (
    "layers",
    "attention",
    *(f"WER {split}, {way}" for way in ("greedy", "default") for split in SPLITS),
    "training, CPU-s an epoch",
    "inference, CPU-ms",
    "ratio to the first row",
    "attention, million multiply-adds",
    "million distances",
    "parameters",
)


def render_claim(claim: Claim, plan: ClaimPlan, start: Start) -> str:
    """Write method and table."""
    counts = claim.findings[0].errors["greedy"]
    recordings = ", ".join(
        f"{len(seconds)} of {split}, {min(seconds):.0f} to {max(seconds):.0f} s, {counts[split].num_said} words"
        for split, seconds in claim.recordings.items()
    )
    method = _METHOD.format(
        start=f"{start.name} {start.version}",
        num_steps=claim.num_steps,
        epochs=plan.recipe.epochs,
        steps_per_epoch=claim.steps_per_epoch,
        recordings=recordings,
        resolution=100 / max(1, counts["test_dev"].num_said),
        num_tokens=claim.num_tokens,
        rounds=plan.rounds,
        bits=max((row.attention.bits for row in plan.rows if row.attention), default=0),
    )
    rows = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|", *map(_render_row, claim.findings)]
    return f"{method}\n\n" + "\n".join(rows)


def describe_claim(claim: Claim, plan: ClaimPlan, start: Start) -> dict[str, Any]:
    """Everything measured, as JSON can hold it."""
    return {
        "start": {"name": start.name, "version": start.version},
        "epochs": plan.recipe.epochs,
        "num_steps": claim.num_steps,
        "num_tokens": claim.num_tokens,
        "recordings_seconds": claim.recordings,
        "rows": [
            asdict(finding)
            | {"row": finding.row.key, "cost": finding.cost._asdict()}
            | {"errors": {way: {s: c._asdict() for s, c in counts.items()} for way, counts in finding.errors.items()}}
            for finding in claim.findings
        ],
    }


def _render_row(finding: Finding) -> str:
    rates = [
        f"{100 * finding.errors[way][split].rate:.1f} %" if way in finding.errors else "as greedy"
        for way in ("greedy", "default")
        for split in SPLITS
    ]
    cells = (
        str(finding.row.num_layers),
        finding.row.name,
        *rates,
        "–" if finding.epoch_seconds is None else f"{finding.epoch_seconds:.0f}",
        f"{1e3 * finding.seconds:.0f}",
        f"{finding.to_first:.2f}",
        f"{finding.cost.multiply_adds / 1e6:.0f}",
        f"{finding.cost.distances / 1e6:.0f}",
        f"{finding.num_parameters / 1e6:.2f} M",
    )
    return f"| {' | '.join(cells)} |"
