"""What was measured of servers → Markdown: the figures that have a goal, medians, raw numbers."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from statistics import median

from benchmarks.contestants import OURS, PLAIN
from benchmarks.figures import median_ratio
from benchmarks.serving import BARE, WITHOUT_DECODING, Plan, Window

METHOD = """Contestants:

- `ours`: our service with default settings and its JSON access log;
- `plain`: a synchronous FastAPI route with uvicorn's own access log, both as they come (`benchmarks/plain.py`);
- `bare`: ONNX Runtime in a loop without HTTP, at several batch sizes (`benchmarks/bare.py`).

All run the same program with one thread inside a call and decode the same 256x256 JPEG files with the same function.
Both servers run on uvicorn with uvloop and httptools and log to a file. The load generator is one thread on the same
cores; its CPU stands beside that of the servers and is not subtracted.

Contestants take turns within a round; ratios are taken within a round, and medians over rounds. `÷ bare` and `beyond
bare` compare with the fastest bare loop of the same round and load, decoding included. Latency in an open loop counts
from when a request was due; that of a bare loop is that of one call. CPU is user and system time of the server's
process for one request. `others` is how many cores other processes kept busy meanwhile, `stolen` how many the
hypervisor gave away."""

COLUMNS = (
    "load",
    "contestant",
    "answers/s",
    "÷ bare",
    "p50 ms",
    "p99 ms",
    "CPU-ms",
    "beyond bare",
    "client CPU-ms",
    "errors",
    "others",
    "stolen",
)


def render_bundle(name: str, windows: Sequence[Window], *, max_batch: int, plan: Plan) -> str:
    """Render all that was measured of a bundle."""
    return f"""## {name}

{plan.rounds} rounds; each line of a round is {plan.seconds:g} s after {plan.warm_seconds:g} s of warm-up.
Batch cap that the service found: {max_batch}.

{render_figures(windows)}

{render_medians(windows)}

Raw numbers, in base units:

```
{render_raw(windows)}
```"""


def render_figures(windows: Sequence[Window]) -> str:
    """Render the figures that have a goal as a list."""
    of_bare = median(_rate_of_bare(windows, "c=64", OURS))
    of_ready = median_ratio(
        [window.rate for window in _by_round(windows, "c=64", OURS)], _best_rates(windows, WITHOUT_DECODING)
    )
    latency = median_ratio(
        *([window.p50_seconds for window in _by_round(windows, "c=1", name)] for name in (OURS, PLAIN))
    )
    costs = ", ".join(
        f"{median(_seconds_beyond_bare(windows, load, OURS)) * 1e3:.2f} at {load}"
        for load in _loads(windows)
        if load.startswith("c=")
    )
    return f"""- Throughput at c=64 ÷ bare loop: **{of_bare:.3f}**; ÷ bare loop without decoding: {of_ready:.3f}
- Median latency at c=1 ÷ plain FastAPI: **{latency:.3f}**
- CPU-ms of one request beyond decoding and inference: {costs}"""


def render_medians(windows: Sequence[Window]) -> str:
    """Render the medians over rounds as a table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for load in _loads(windows):
        for contestant in dict.fromkeys(window.contestant for window in windows if window.load == load):
            rounds = _by_round(windows, load, contestant)
            has_bare = contestant in (OURS, PLAIN) and bool(_best_rates(windows, load))
            cells = [
                load,
                contestant,
                _median(rounds, lambda window: window.rate, ".1f"),
                f"{median(_rate_of_bare(windows, load, contestant)):.3f}" if has_bare else "",
                _median(rounds, lambda window: window.p50_seconds * 1e3, ".2f"),
                _median(rounds, lambda window: window.p99_seconds * 1e3, ".2f"),
                _median(rounds, lambda window: window.cpu_seconds * 1e3, ".2f"),
                f"{median(_seconds_beyond_bare(windows, load, contestant)) * 1e3:.2f}" if has_bare else "",
                _median(rounds, lambda window: window.client_cpu_seconds * 1e3, ".3f"),
                str(sum(window.num_errors for window in rounds)),
                _median(rounds, lambda window: window.other_cores, ".2f"),
                _median(rounds, lambda window: window.stolen_cores, ".2f"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_raw(windows: Sequence[Window]) -> str:
    """Render every window as a line, values separated by semicolons."""
    lines = [";".join(field.name for field in fields(Window))]
    lines += [
        ";".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in astuple(window))
        for window in windows
    ]
    return "\n".join(lines)


def _loads(windows: Sequence[Window]) -> list[str]:
    return list(dict.fromkeys(window.load for window in windows))


def _by_round(windows: Sequence[Window], load: str, contestant: str) -> list[Window]:
    found = [window for window in windows if (window.load, window.contestant) == (load, contestant)]
    return sorted(found, key=lambda window: window.round)


def _median(windows: Sequence[Window], value: Callable[[Window], float], form: str) -> str:
    return format(median(map(value, windows)), form)


def _best_bare(windows: Sequence[Window], load: str) -> list[Window]:
    """The faster bare loop of each round; none where no bare loop stands beside the load."""
    best: dict[int, Window] = {}
    for window in windows:
        if window.load == load and window.contestant.startswith(BARE):
            other = best.get(window.round, window)
            best[window.round] = max(window, other, key=lambda either: either.rate)
    return [best[index] for index in sorted(best)]


def _best_rates(windows: Sequence[Window], load: str) -> list[float]:
    return [window.rate for window in _best_bare(windows, load)]


def _rate_of_bare(windows: Sequence[Window], load: str, contestant: str) -> list[float]:
    rounds = _by_round(windows, load, contestant)
    return [window.rate / rate for window, rate in zip(rounds, _best_rates(windows, load), strict=True)]


def _seconds_beyond_bare(windows: Sequence[Window], load: str, contestant: str) -> list[float]:
    rounds = _by_round(windows, load, contestant)
    return [
        window.cpu_seconds - bare.cpu_seconds for window, bare in zip(rounds, _best_bare(windows, load), strict=True)
    ]
