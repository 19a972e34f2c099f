"""What was measured of long recordings, as Markdown for people and as JSON for whoever computes on."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from benchmarks.figures import median_ratio
from benchmarks.mixed_load import NUM_CONNECTIONS, Window
from benchmarks.recording_lengths import Gap, Point
from benchmarks.recordings import FULL, Findings
from benchmarks.speaker_recordings import Speaker
from benchmarks.speech_service import REQUEST_SECONDS

GOAL_POINTS = 2.0


def render_recordings(found: Findings) -> str:
    """Render everything as Markdown."""
    return f"""{found.model} {found.version}, default decoding, over HTTP; SERVICE_REQUEST_TIMEOUT_SECONDS is \
{REQUEST_SECONDS:g}, all other settings are the default ones.

## Speakers

{render_speakers(found.speakers, stated=found.stated_error_rate)}

## Lengths

{render_lengths(found.points, found.gaps)}

## Short recordings beside a long one

{render_windows(found.windows)}"""


def render_json(found: Findings, setting: str) -> str:
    """Write all numbers, with the conditions they were measured under.

    Args:
        found: all that was measured.
        setting: a Markdown list, as `describe_setting` gives it.
    """
    conditions = dict(line.removeprefix("- ").split(": ", 1) for line in setting.splitlines())
    return json.dumps({"conditions": conditions, **asdict(found)}, indent=2) + "\n"


def render_speakers(speakers: Sequence[Speaker], *, stated: float | None) -> str:
    """Compare the word error rates of utterances and of joined recordings, for the same words."""
    rows = [
        f"| {one.name} | {one.seconds:.1f} | {one.num_words} | {_percent(one.errors_alone, one.num_words)} | "
        f"{'' if one.errors_joined is None else _percent(one.errors_joined, one.num_words)} |"
        for one in speakers
    ]
    joined = [(one, one.errors_joined) for one in speakers if one.errors_joined is not None]
    num_words = sum(one.num_words for one, _ in joined)
    alone, whole = sum(one.errors_alone for one, _ in joined), sum(errors for _, errors in joined)
    all_errors, all_words = sum(one.errors_alone for one in speakers), sum(one.num_words for one in speakers)
    told = "it states none" if stated is None else f"it states {100 * stated:.2f} %"
    compared = (
        f"Joined recordings against utterances, the same {num_words} words: "
        f"**{100 * (whole - alone) / num_words:+.2f} points** (goal: at most {GOAL_POINTS:g})"
        if joined
        else "No speaker has enough for a joined recording"
    )
    return f"""| speaker of test_dev | seconds | words | WER, utterance by utterance | WER, one recording in one pass |
|---|---|---|---|---|
{chr(10).join(rows)}
| those with both | {sum(one.seconds for one, _ in joined):.1f} | {num_words} | {_percent(alone, num_words)} | \
{_percent(whole, num_words)} |
| all | {sum(one.seconds for one in speakers):.1f} | {all_words} | {_percent(all_errors, all_words)} | |

Utterance by utterance, all of test_dev: **{_percent(all_errors, all_words)}** (manifest: {told}). {compared}."""


def render_lengths(points: Sequence[Point], gaps: Sequence[Gap]) -> str:
    """Write a row for each length and contestant, and what full attention costs in proportion."""
    full = {point.length: point for point in points if point.contestant == FULL}
    rows = []
    for point in points:
        beside = full.get(point.length) if point.contestant != FULL else None
        time = f"{point.seconds / beside.seconds:.3f}" if beside else ""
        memory = f"{point.added_bytes / beside.added_bytes:.3f}" if beside else ""
        rows.append(
            f"| {point.length / 60:g} | {point.contestant} | {point.seconds:.2f} | {point.real_time_factor:.4f} | "
            f"{point.cpu_seconds:.2f} | {point.stages.get('run', 0.0):.2f} | {point.added_bytes / 1e6:.0f} | "
            f"{point.peak_bytes / 1e6:.0f} | {time} | {memory} | {_percent(point.num_errors, point.num_words)} |"
        )
    missing = "".join(f"\n- {gap.contestant}, {gap.length / 60:g} minutes: {gap.reason}" for gap in gaps)
    return f"""One request at a time; a batch of one computes on one core. A service process for each row.

| minutes | attention | seconds | real-time factor | CPU-s | program, s | MB for the request | MB of the process | \
time ÷ full | memory ÷ full | WER |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Joined utterances of valid, each whole. MB: most resident memory, without and with what the process had before, which
includes what its check of the golden outputs left in ONNX Runtime's arena.\
{f"{chr(10)}{chr(10)}Not measured:{chr(10)}{missing}" if gaps else ""}"""


def render_windows(windows: Sequence[Window]) -> str:
    """Compare latencies of short recordings, by round and as medians."""
    alone, beside = ([window for window in windows if window.has_long is has_long] for has_long in (False, True))
    rows = [
        f"| {window.round} | {'yes' if window.has_long else 'no'} | {window.num_answers} | {window.num_errors} | "
        f"{window.p50_seconds * 1e3:.1f} | {window.p95_seconds * 1e3:.1f} | "
        f"{', '.join(f'{seconds:.1f}' for seconds in window.long_seconds)} |"
        for window in windows
    ]
    p50 = median_ratio([one.p50_seconds for one in beside], [one.p50_seconds for one in alone])
    p95 = median_ratio([one.p95_seconds for one in beside], [one.p95_seconds for one in alone])
    return f"""Utterances of test_dev on {NUM_CONNECTIONS} connections, each with one request in flight.

| round | beside a long one | answers | errors | p50, ms | p95, ms | seconds of each long request |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Beside the long recording the median latency is **{p50:.2f}** of that alone and p95 **{p95:.2f}** (medians over rounds \
of the ratio within a round); p95 beside it is {median(one.p95_seconds for one in beside) * 1e3:.0f} ms."""


def _percent(num_errors: int, num_words: int) -> str:
    return f"{100 * num_errors / num_words:.2f} %" if num_words else ""
