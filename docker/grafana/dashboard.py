"""The dashboard, as code: `python docker/grafana/dashboard.py` prints the JSON that Grafana reads (`make dashboard`).

Built with Grafana's own types, so that a field that Grafana does not know is an error here. The queries are strings to
it; the tests run each of them on a Prometheus that has scraped the service.
"""

import json
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueColorMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    Panel,
    Threshold,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")  # as in provisioning/datasources/prometheus.yaml
QUANTILES = (0.5, 0.95, 0.99)
STAGES = ("decode", "queue", "run", "postprocess")
WIDTH, HEIGHT = 8, 8  # three beside each other: Grafana's grid has 24 columns

Graph = timeseries.Panel
Queries = Mapping[str, str]  # legend → query


def build_dashboard() -> dashboard.Dashboard:
    """Lay out all rows."""
    model = (
        dashboard.QueryVariable("model")
        .label("Model")
        .datasource(SOURCE)
        .query("label_values(inference_queue_limit, model)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )
    board = (
        dashboard.Dashboard("Clustered-attention inference")
        .uid("clustered-attention")
        .tags(["inference"])
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-30m", "now")
        .with_variable(model)
    )
    rows: dict[str, Sequence[Builder[Panel]]] = {
        "Traffic": traffic(),
        "Latency": latency(),
        "Batching": batching(),
        "Saturation": saturation(),
        "Devices": devices(),
        "Process": process(),
    }
    for title, panels in rows.items():
        board.with_row(dashboard.Row(title))
        for panel in panels:
            board.with_panel(panel)
    return board


def traffic() -> list[Builder[Panel]]:
    """What is asked, what goes wrong, what is served."""
    firing = (
        stat.Panel()
        .title("Alerts firing")
        .description("Prometheus has their list, under /alerts; docs/operations.md says what to do.")
        .datasource(SOURCE)
        .span(WIDTH)
        .height(HEIGHT)
        .color_mode(BigValueColorMode.BACKGROUND)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard.ThresholdsConfig().steps([Threshold(color="green"), Threshold(value=1, color="red")]))
        .with_target(query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing"))
    )
    served = (
        table.Panel()
        .title("What is served")
        .description("kernel: native, or portable where the program runs the body that it holds.")
        .datasource(SOURCE)
        .span(2 * WIDTH)
        .height(HEIGHT)
        .with_target(query('inference_bundle_info{model=~"$model"}', "").instant().format(PromQueryFormat.TABLE))
        .with_transformation(
            DataTransformerConfig(
                id_val="filterFieldsByName",
                options={"include": {"names": ["model", "version", "runtime", "kernel", "sha256", "instance"]}},
            )
        )
    )
    return [
        graph(
            "Requests",
            "Finished requests, whatever came of them.",
            "reqps",
            {"{{model}}": rate("model", "inference_requests_total")},
        ),
        graph(
            "Errors by code",
            "docs/api.md says what each code means. Codes of 4xx are the clients' mistakes.",
            "reqps",
            {"{{model}} {{outcome}}": rate("model, outcome", "inference_requests_total", 'outcome!~"ok|cancelled"')},
        ),
        graph(
            "Drops",
            "Accepted requests whose deadline passed (expired) or whose client left (abandoned).",
            "reqps",
            {"{{model}} {{reason}}": rate("model, reason", "inference_drops_total")},
        ),
        firing,
        served,
    ]


def latency() -> list[Graph]:
    """Quantiles of the whole request and of each stage, for each model."""
    whole = graph(
        "Request",
        "From the first byte of the request to the last of the answer; successful requests.",
        "s",
        quantiles("inference_request_duration_seconds"),
    ).span(2 * WIDTH)
    stages = [
        graph(
            f"Stage {stage}",
            "Of a batch." if stage == "run" else "Of a sample.",
            "s",
            quantiles("inference_stage_duration_seconds", f'stage="{stage}"'),
        )
        for stage in STAGES
    ]
    return [whole, *stages]


def batching() -> list[Graph]:
    """How full the batches are, and how much of them is padding."""
    return [
        graph(
            "Batch size",
            "Samples in a batch.",
            "short",
            {"mean {{model}}": mean("inference_batch_size")} | quantiles("inference_batch_size", shares=(0.95,)),
        ),
        graph(
            "Padding",
            "Mean share of a batch that is padding.",
            "percentunit",
            {"{{model}}": mean("inference_batch_padding_ratio")},
        ),
        graph(
            "Batches in flight",
            "Batches that run, and as many as may.",
            "short",
            {
                "{{model}}": 'sum by (model) (inference_batches_in_flight{model=~"$model"})',
                "{{model}} workers": 'sum by (model) (inference_workers{model=~"$model"})',
            },
        ),
    ]


def saturation() -> list[Graph]:
    """How much is left before requests are refused."""
    return [
        graph(
            "Queue depth",
            "Accepted requests without an answer, and the limit.",
            "short",
            {
                "{{model}}": 'sum by (model) (inference_queue_depth{model=~"$model"})',
                "{{model}} limit": 'sum by (model) (inference_queue_limit{model=~"$model"})',
            },
        ),
        graph(
            "Queue saturation",
            "Share of the places that is taken; at 100 % requests are refused.",
            "percentunit",
            {
                "{{model}}": 'max by (model) (inference_queue_depth{model=~"$model"} '
                '/ inference_queue_limit{model=~"$model"})'
            },
        ).max(1),
        graph(
            "Worker saturation",
            "Share of the time in which the workers of a model ran a program.",
            "percentunit",
            {
                "{{model}}": rate("model", "inference_stage_duration_seconds_sum", 'stage="run"')
                + ' / sum by (model) (inference_workers{model=~"$model"})'
            },
        ).max(1),
    ]


def devices() -> list[Graph]:
    """The GPUs; without data where there is none."""
    return [
        graph(
            "GPU memory",
            "In use by all processes, and all there is.",
            "bytes",
            {
                "{{instance}} GPU {{device}}": "inference_device_memory_used_bytes",
                "{{instance}} GPU {{device}} total": "inference_device_memory_total_bytes",
            },
        ),
        graph(
            "GPU utilisation",
            "Share of the time in which some kernel ran.",
            "percentunit",
            {"{{instance}} GPU {{device}}": "inference_device_utilisation_ratio"},
        ).max(1),
        graph(
            "GPU answers",
            "1 while it answers and takes batches of a model, 0 once it is lost.",
            "short",
            {
                "{{instance}} GPU {{device}}": "inference_device_up",
                "{{instance}} {{model}} on {{device}}": "inference_model_device_up",
            },
        ).max(1),
    ]


def process() -> list[Graph]:
    """The process and its Python."""
    job = 'job="service"'
    return [
        graph(
            "CPU",
            "Cores in use.",
            "short",
            {"{{instance}}": f"rate(process_cpu_seconds_total{{{job}}}[$__rate_interval])"},
        ),
        graph("Memory", "Resident.", "bytes", {"{{instance}}": f"process_resident_memory_bytes{{{job}}}"}),
        graph(
            "Open files",
            "Connections are among them; and the limit.",
            "short",
            {"{{instance}}": f"process_open_fds{{{job}}}", "{{instance}} limit": f"process_max_fds{{{job}}}"},
        ),
        graph(
            "Garbage collections",
            "One of generation 2 stops all threads for some milliseconds.",
            "ops",
            {"generation {{generation}}": f"rate(python_gc_collections_total{{{job}}}[$__rate_interval])"},
        ),
        graph("Service answers Prometheus", "0 while it does not.", "short", {"{{instance}}": f"up{{{job}}}"}).max(1),
    ]


def graph(title: str, description: str, unit: str, queries: Queries) -> Graph:
    """Make a panel of lines over time.

    Args:
        title: unique on the dashboard.
        description: what a reader sees beside the title.
        unit: Grafana's name for it.
        queries: legend → query.
    """
    panel = Graph().title(title).description(description).datasource(SOURCE).unit(unit).min(0)
    panel.span(WIDTH).height(HEIGHT)
    for name, (legend, expression) in zip(ascii_uppercase, queries.items(), strict=False):
        panel.with_target(query(expression, legend, name=name))
    return panel


def query(expression: str, legend: str, *, name: str = "A") -> prometheus.Dataquery:
    """Make one query of a panel; its name is unique there."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(name)


def rate(by: str, metric: str, labels: str = "") -> str:
    """Write the rate of a counter of the chosen models, summed by some of its labels."""
    selected = ", ".join(filter(None, ('model=~"$model"', labels)))
    return f"sum by ({by}) (rate({metric}{{{selected}}}[$__rate_interval]))"


def mean(histogram: str) -> str:
    """Write the mean of a histogram; no value while nothing happens."""
    return f"{rate('model', f'{histogram}_sum')} / {rate('model', f'{histogram}_count')}"


def quantiles(histogram: str, labels: str = "", *, shares: tuple[float, ...] = QUANTILES) -> dict[str, str]:
    """Write quantiles of a histogram, for each model."""
    buckets = rate("model, le", f"{histogram}_bucket", labels)
    return {
        f"p{share:.0%} {{{{model}}}}".replace("%", ""): f"histogram_quantile({share}, {buckets})" for share in shares
    }


def render() -> str:
    """Give the dashboard as JSON; panels are numbered by their place."""
    board = build_dashboard().build()
    for number, panel in enumerate(board.panels or [], start=1):
        panel.id_val = number
    return json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(render(), end="")
