import json
from dataclasses import replace

from benchmarks.mixed_load import Window
from benchmarks.recording_lengths import Gap
from benchmarks.recordings import FULL, KERNEL, Findings
from benchmarks.recordings_report import render_json, render_lengths, render_recordings, render_speakers, render_windows
from benchmarks.speaker_recordings import Speaker
from tests.benchmarks.test_recording_lengths import POINT

SPEAKERS = [
    Speaker(name="fcaw", seconds=41.0, num_words=60, errors_alone=6, errors_joined=9),
    Speaker(name="menk", seconds=36.0, num_words=40, errors_alone=4, errors_joined=3),
    Speaker(name="mjwl", seconds=28.5, num_words=100, errors_alone=30, errors_joined=None),
]
POINTS = [
    replace(POINT, contestant=KERNEL, length=120.0, recording_seconds=100.0, seconds=1.0, peak_bytes=50_000_100),
    replace(POINT, contestant=FULL, length=120.0, recording_seconds=100.0, seconds=8.0, peak_bytes=400_000_100),
    replace(POINT, contestant=KERNEL, length=1800.0, recording_seconds=1750.0, seconds=17.5, peak_bytes=900_000_100),
]
GAPS = [Gap(FULL, 600.0, "would take about 15.6 GB, and 14.0 GB are available")]


def window(index: int, *, has_long: bool, p50: float, p95: float) -> Window:
    return Window(
        round=index,
        has_long=has_long,
        num_answers=90,
        num_errors=2,
        p50_seconds=p50,
        p95_seconds=p95,
        long_seconds=[4.0, 4.5] if has_long else [],
    )


# In the second round the machine was slower; the ratios are 1.5, 1.5, 1.8 and 2, 2, 3.
WINDOWS = [
    window(index, has_long=has_long, p50=scale * p50, p95=scale * p95)
    for index, scale in enumerate((1.0, 2.0, 1.0))
    for has_long, p50, p95 in ((False, 0.02, 0.03), (True, 0.036 if index == 2 else 0.03, 0.09 if index == 2 else 0.06))
]
FOUND = Findings(
    model="letters-small",
    version="1.2.3",
    stated_error_rate=0.2,
    speakers=SPEAKERS,
    points=POINTS,
    gaps=GAPS,
    windows=WINDOWS,
)


def test_joined_recordings_are_compared_with_utterances_over_the_same_words() -> None:
    text = render_speakers(SPEAKERS, stated=0.2)
    assert "| fcaw | 41.0 | 60 | 10.00 % | 15.00 % |" in text
    assert "| mjwl | 28.5 | 100 | 30.00 % |  |" in text
    assert "| those with both | 77.0 | 100 | 10.00 % | 12.00 % |" in text
    assert "the same 100 words: **+2.00 points**" in text
    assert "all of test_dev: **20.00 %** (manifest: it states 20.00 %)" in text


def test_without_a_long_speaker_nothing_is_compared() -> None:
    text = render_speakers(SPEAKERS[2:], stated=None)
    assert "No speaker has enough" in text
    assert "it states none" in text
    assert "points" not in text


def test_a_length_is_set_beside_full_attention_where_that_was_measured() -> None:
    text = render_lengths(POINTS, GAPS)
    assert f"| 2 | {KERNEL} | 1.00 | 0.0100 | 1.90 | 1.50 | 50 | 50 | 0.125 | 0.125 | 25.00 % |" in text
    assert f"| 2 | {FULL} | 8.00 | 0.0800 | 1.90 | 1.50 | 400 | 400 |  |  | 25.00 % |" in text
    assert f"| 30 | {KERNEL} | 17.50 | 0.0100 | 1.90 | 1.50 | 900 | 900 |  |  | 25.00 % |" in text
    assert f"- {FULL}, 10 minutes: would take about 15.6 GB" in text
    assert "Not measured" not in render_lengths(POINTS, [])


def test_latencies_are_compared_within_a_round() -> None:
    text = render_windows(WINDOWS)
    assert "| 0 | yes | 90 | 2 | 30.0 | 60.0 | 4.0, 4.5 |" in text
    assert "| 1 | no | 90 | 2 | 40.0 | 60.0 |  |" in text
    assert "median latency is **1.50** of that alone and p95 **2.00**" in text


def test_everything_is_in_the_table_and_in_the_numbers() -> None:
    text = render_recordings(FOUND)
    assert text.startswith("letters-small 1.2.3, default decoding")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Speakers",
        "## Lengths",
        "## Short recordings beside a long one",
    ]
    numbers = json.loads(render_json(FOUND, "- Command: `python -m benchmarks`\n- Machine: a, 2 cores: busy"))
    assert numbers["conditions"] == {"Command": "`python -m benchmarks`", "Machine": "a, 2 cores: busy"}
    assert numbers["points"][0]["contestant"] == KERNEL
    assert numbers["gaps"][0]["length"] == 600.0
    assert numbers["speakers"][2]["errors_joined"] is None
    assert len(numbers["windows"]) == 6
