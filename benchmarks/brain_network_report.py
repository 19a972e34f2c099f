"""The tables of the cross-validation of brain networks, as Markdown."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.brain_network_rows import ROWS, TASKS, Row
from benchmarks.brain_networks import FOLDS, Cell

TITLES = {
    "abide-diagnosis": "ABIDE I, control or autism (729 subjects, AAL-116 graphs)",
    "abide-age": "ABIDE I, age above the median or not (the same graphs)",
    "mdd": "MDD, control or depression (125 subjects, 78 regions, Fisher's z)",
    "adhd-site": "ADHD-200, which of six sites (426 subjects, 190 regions, correlations)",
}
METRICS = {"auroc": "AUROC", "accuracy": "accuracy", "sensitivity": "sensitivity", "specificity": "specificity"}
METHOD = """Five folds; figures are means ± standard deviations over folds, after the mean over seeds. Training, an
epoch of it, and inference are CPU time of one thread; inference is one subject by itself in torch, with the losses of
THC that a program leaves out. Nothing was chosen on the subjects of the fold
that is measured within its run; settings were chosen on folds 1 to 4, trained without fold 0, so that fold 0 alone is
untouched by them, but for the encoder's kind, which was chosen when the table was known: it has a column of its own."""

Results = Mapping[Cell, Mapping[str, Any]]


def render_cells(results: Results) -> str:
    """Write a table per task, and one of communities where networks are known."""
    parts = [METHOD]
    for task, title in TITLES.items():
        lines = [line for row in ROWS if (line := render_row(row, task, results))]
        if lines:
            names = list(METRICS.values()) if TASKS[task].num_classes == 2 else ["accuracy"]
            heads = [
                "model",
                "seeds",
                *names,
                f"{names[0]} of fold 0",
                "training s",
                "s per epoch",
                "inference ms",
                "parameters",
            ]
            parts += [f"## {title}", "\n".join([_line(heads), _line(["---"] * len(heads)), *lines])]
    if communities := render_communities(results):
        parts += ["## Communities and named networks", communities]
    return "\n\n".join(parts)


def render_row(row: Row, task: str, results: Results) -> str:
    """Write a row's line of one task; nothing where no fold was measured, a mark where some were not."""
    cells = {cell: found for cell, found in results.items() if cell.row == row and cell.task == task}
    if not cells:
        return ""
    names = list(METRICS) if TASKS[task].num_classes == 2 else ["accuracy"]
    folds = {fold: [found for cell, found in cells.items() if cell.fold == fold] for fold in FOLDS}
    measured = {fold: found for fold, found in folds.items() if found}
    mark = "" if len(measured) == len(FOLDS) else f" ({len(measured)} of {len(FOLDS)} folds)"
    columns = [row.title + mark, str(len({cell.seed for cell in cells}))]
    for name in names:
        means = [statistics.mean(one["metrics"][name] for one in found) for found in measured.values()]
        spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
        columns.append(f"{statistics.mean(means):.3f}{spread}")
    first = [one["metrics"][names[0]] for one in folds[0]]
    columns.append(f"{statistics.mean(first):.3f}" if first else "")
    number = next(iter(cells.values()))["num_parameters"]
    seconds, times = ([found[name] for found in cells.values()] for name in ("train_seconds", "inference_ms"))
    epochs = [found["epoch_seconds"] for found in cells.values() if "epoch_seconds" in found]
    columns += [f"{statistics.mean(seconds):.1f}", f"{statistics.mean(epochs):.2f}" if epochs else ""]
    return _line([*columns, f"{statistics.median(times):.2f}", f"{number:,}"])


def render_communities(results: Results) -> str:
    """Write how far communities agree with named networks: means over folds and seeds."""
    found = [((cell.task, cell.row.title), one["communities"]) for cell, one in results.items() if "communities" in one]
    if not found:
        return ""
    heads = ["task", "model", "communities", "number", "adjusted Rand", "normalised mutual information"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for key in dict.fromkeys(key for key, _ in found):
        of_model = [communities for name, communities in found if name == key]
        for way in of_model[0]:
            number, rand, information = (
                statistics.mean(communities[way][name] for communities in of_model)
                for name in ("num_parts", "adjusted_rand", "mutual_information")
            )
            lines.append(_line([*key, way, f"{number:.1f}", f"{rand:.3f}", f"{information:.3f}"]))
    return "\n".join(lines)


def _line(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"
