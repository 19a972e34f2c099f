from benchmarks.serving import WITHOUT_DECODING, Plan, Window
from benchmarks.serving_report import render_bundle, render_figures, render_medians, render_raw


def window(load: str, contestant: str, index: int, *, rate: float, p50: float = 0.01, cpu: float = 0.005) -> Window:
    return Window(
        load=load,
        contestant=contestant,
        round=index,
        rate=rate,
        p50_seconds=p50,
        p99_seconds=2 * p50,
        cpu_seconds=cpu,
        client_cpu_seconds=4e-5,
        num_errors=index,
        other_cores=0.25,
        stolen_cores=0.0,
    )


# Three rounds; the machine was twice as fast in the last one. At batch 8 the bare loop is the faster one.
WINDOWS = [
    one
    for index, speed in enumerate((1.0, 1.0, 2.0))
    for one in (
        window("c=1", "bare, 1 threads, batch 1", index, rate=150 * speed, cpu=0.0052),
        window("c=1", "ours", index, rate=140 * speed, p50=0.0075 / speed, cpu=0.0060),
        window("c=1", "plain", index, rate=140 * speed, p50=0.0070 / speed, cpu=0.0063),
        window("c=64", "bare, 2 threads, batch 1", index, rate=300 * speed),
        window("c=64", "bare, 2 threads, batch 8", index, rate=400 * speed),
        window("c=64", "ours", index, rate=370 * speed, cpu=0.0053),
        window("c=64", "plain", index, rate=250 * speed, cpu=0.0063),
        window("open 120/s", "ours", index, rate=120),
        window("open 120/s", "plain", index, rate=120),
        window(WITHOUT_DECODING, "bare, 2 threads, batch 1", index, rate=500 * speed),
    )
]


def test_figures_compare_with_the_fastest_bare_loop_of_the_round() -> None:
    assert render_figures(WINDOWS).splitlines() == [
        "- Throughput at c=64 ÷ bare loop: **0.925**; ÷ bare loop without decoding: 0.740",
        "- Median latency at c=1 ÷ plain FastAPI: **1.071**",
        "- CPU-ms of one request beyond decoding and inference: 0.80 at c=1, 0.30 at c=64",
    ]


def test_medians_stand_in_one_row_for_each_contestant_under_each_load() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in render_medians(WINDOWS).splitlines()]
    table = {(row[0], row[1]): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert len(table) == 10
    ours = table["c=64", "ours"]
    assert (ours["answers/s"], ours["÷ bare"], ours["p50 ms"], ours["p99 ms"]) == ("370.0", "0.925", "10.00", "20.00")
    assert (ours["CPU-ms"], ours["beyond bare"], ours["client CPU-ms"]) == ("5.30", "0.30", "0.040")
    assert (ours["errors"], ours["others"], ours["stolen"]) == ("3", "0.25", "0.00")
    assert table["open 120/s", "ours"]["÷ bare"] == ""
    assert table["c=64", "bare, 2 threads, batch 8"]["beyond bare"] == ""


def test_every_window_is_among_the_raw_numbers() -> None:
    lines = render_raw(WINDOWS).splitlines()
    assert lines[0].startswith("load;contestant;round;rate;")
    assert lines[2] == "c=1;ours;0;140;0.0075;0.015;0.006;4e-05;0;0.25;0"
    assert len(lines) == 1 + len(WINDOWS)


def test_a_bundle_section_says_how_it_was_measured() -> None:
    text = render_bundle("some-bundle", WINDOWS, max_batch=8, plan=Plan(rounds=3, seconds=2.5, warm_seconds=0.5))
    assert text.startswith("## some-bundle\n")
    for fact in ("3 rounds", "2.5 s after 0.5 s of warm-up", "the service found: 8"):
        assert fact in text
