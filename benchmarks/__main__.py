"""Measure, and write what was measured to `benchmarks/results/`: `python -m benchmarks [SUBJECT]`.

serving     our service beside a plain FastAPI route and the bare ONNX Runtime loop
robustness  bad pictures among good ones, 600 requests at once
startup     from the start of the process to the first answer
attention   full, clustered and improved-clustered attention against the length, with a plot
export      the ONNX program beside eager torch
quality     accuracy, or word errors, on test_dev over HTTP; needs ../shared/data
explanations  whether the clusters that explain an answer carry it, and what explaining costs; needs ../shared/data
long-recordings  minutes and an hour in one request, by the ordinary program and shared by ranks; goes on where it was
            interrupted; needs ../shared/data
recordings  long recordings and mixed lengths on the speech recogniser; needs the data sets and a bundle of one
tcformer    TCFormer's program beside its module and beside scattered exchange, and the cost of its two versions
segmentation  finished training runs of segmenters beside each other: quality, cost, size; needs such runs
parallel    what sequence parallelism sends, and the memory of a rank, on 1, 2 and 4 processes
clustering  word errors and cost of a speech recogniser with full and with clustered attention; takes half an hour,
            goes on where it was interrupted; needs ../shared/data
brain-networks  cross-validation of classifiers of brain networks; takes most of an hour, goes on where it was
            interrupted; needs ../shared/data
gpu         every bundle on a GPU, by ONNX, TorchScript, AOTInductor and eager torch, and attention up to N = 128k;
            needs CUDA; with --device cpu the bundles alone, on the CPU

All of them but the last three by default. Machines are noisy: compare numbers of one run only, and close what else
runs.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.attention_scaling import Plan as ScalingPlan
from benchmarks.attention_scaling import measure_scaling, plot_scaling, render_scaling
from benchmarks.brain_network_costs import measure_costs, render_costs
from benchmarks.brain_network_report import render_cells
from benchmarks.brain_networks import list_cells, measure_cells
from benchmarks.bundles import open_random_bundle
from benchmarks.clustering_claim import make_plan, make_quick_plan, measure_claim
from benchmarks.clustering_report import describe_claim, render_claim
from benchmarks.explanations import TEST_FILE as EXPLAINED_FILE
from benchmarks.explanations import measure_explanations, render_explanations
from benchmarks.gpu import FP16_ROOTS, FP32_ROOTS, ON_CPU, find_fault, measure_gpu
from benchmarks.gpu import QUICK as QUICK_GPU
from benchmarks.gpu import Plan as GpuPlan
from benchmarks.gpu_attention import plot_attention, render_attention
from benchmarks.gpu_report import render_gpu
from benchmarks.long_recordings import FULL as FULL_LONG
from benchmarks.long_recordings import QUICK as QUICK_LONG
from benchmarks.long_recordings import measure_long_recordings, render_long_recordings
from benchmarks.machine import describe_setting, result_path
from benchmarks.parallel import QUICK as QUICK_PARALLEL
from benchmarks.parallel import Plan as ParallelPlan
from benchmarks.parallel import measure_parallel, plot_parallel, render_parallel
from benchmarks.program import measure_program, render_program
from benchmarks.quality import TEST_FILE, measure_quality, render_quality
from benchmarks.recordings import QUICK as QUICK_RECORDINGS
from benchmarks.recordings import Plan as RecordingsPlan
from benchmarks.recordings import find_recogniser, measure_recordings
from benchmarks.recordings_report import render_json, render_recordings
from benchmarks.robustness import measure_robustness, render_robustness
from benchmarks.segmentation_models import RUNS, find_runs, measure_segmenters, render_segmenters
from benchmarks.serving import Plan, measure_serving
from benchmarks.serving_report import METHOD, render_bundle
from benchmarks.startup import measure_startup, render_startup
from benchmarks.token_clustering import QUICK as QUICK_TOKENS
from benchmarks.token_clustering import Plan as TokensPlan
from benchmarks.token_clustering import measure_token_clustering, render_token_clustering
from training.handover import read_start

SCRATCH = Path("build/benchmarks")
RANDOM_BUNDLE = SCRATCH / "paca-vit-random"
BUNDLES = Path("bundles")
SHIPPED_BUNDLE = BUNDLES / "paca-vit-micro-cifar10"
SPEECH_BUNDLE = BUNDLES / "ctc-transformer-small-an4"
DATA = Path("../shared/data")
PROGRAMS_ON_CPU = "programs-on-cpu"  # what `gpu` leaves there: no result of a GPU
CLUSTERING_EPOCHS = 3
FULL = Plan(rounds=3, seconds=2.0, warm_seconds=0.4)
QUICK = Plan(rounds=2, seconds=1.0, warm_seconds=0.3)
QUICK_SCALING = ScalingPlan(sizes=(1024, 4096), rounds=1)


def report_serving(bundle: Path, plan: Plan) -> str:
    """Measure servers on the bundle of the speed goals and on a trained one."""
    open_random_bundle(RANDOM_BUNDLE)
    sections = [METHOD]
    for folder in (RANDOM_BUNDLE, bundle):
        bench = measure_serving(folder, SCRATCH / "logs", plan)
        sections.append(render_bundle(folder.name, bench.windows, max_batch=bench.max_batch, plan=plan))
    return "\n\n".join(sections)


def report_robustness(bundle: Path, plan: Plan) -> str:  # noqa: ARG001 - the same for every bundle and plan
    """Abuse the service, which serves the bundle of the speed goals."""
    open_random_bundle(RANDOM_BUNDLE)
    return render_robustness(measure_robustness(RANDOM_BUNDLE, SCRATCH / "logs"))


def report_export(bundle: Path, plan: Plan) -> str:
    """Time the program of a trained bundle."""
    found = measure_program(bundle, rounds=plan.rounds, seconds=plan.seconds)
    return f"## {bundle.name}\n\n{render_program(found)}"


def report_attention(bundle: Path, plan: Plan) -> str:  # noqa: ARG001 - no bundle takes part
    """Measure attention against the length, and draw it unless in haste."""
    is_quick = plan is QUICK
    points = measure_scaling(SCRATCH / "attention", QUICK_SCALING if is_quick else ScalingPlan())
    if is_quick:
        return render_scaling(points)
    picture = result_path("attention").with_suffix(".png")
    plot_scaling(points, picture)
    return f"{render_scaling(points)}\n\n![CPU time and memory against the length]({picture.name})"


def report_startup(bundle: Path, plan: Plan) -> str:  # noqa: ARG001 - the same for every plan
    """Start the service on a trained bundle."""
    return f"## {bundle.name}\n\n{render_startup(measure_startup(bundle, SCRATCH / 'logs'))}"


def report_quality(bundle: Path, plan: Plan) -> str:  # noqa: ARG001 - the whole split, whatever the plan
    """Measure a trained bundle's accuracy as its users get it."""
    return render_quality(bundle, measure_quality(bundle, SCRATCH / "logs"))


def report_explanations(bundle: Path, plan: Plan) -> str:
    """Blank what explains a trained bundle's answers."""
    is_quick = plan is QUICK
    found = measure_explanations(
        bundle, num_pictures=20 if is_quick else 500, num_draws=5 if is_quick else 20, rounds=plan.rounds
    )
    return f"## {bundle.name}\n\n{render_explanations(found)}"


def report_clustering(
    bundle: Path,  # noqa: ARG001 - it classifies pictures
    plan: Plan,
    *,
    start: Path = SPEECH_BUNDLE,
    epochs: int = CLUSTERING_EPOCHS,
    data: Path = DATA,
) -> str:
    """Compare attentions in a speech recogniser that starts from trained weights."""
    is_quick = plan is QUICK
    begin = read_start(start)
    claim_plan = make_quick_plan() if is_quick else make_plan(epochs=epochs)
    claim = measure_claim(claim_plan, weights=begin.weights, data=data, work=SCRATCH / "clustering")
    if not is_quick:
        numbers = result_path("clustering").with_suffix(".json")
        numbers.parent.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(describe_claim(claim, claim_plan, begin), indent=2) + "\n")
    return render_claim(claim, claim_plan, begin)


def report_recordings(bundle: Path, plan: Plan, *, bundles: Path = BUNDLES, data: Path = DATA) -> str:  # noqa: ARG001
    """Measure the speech recogniser among the bundles; leaves all numbers as JSON unless in haste."""
    is_quick = plan is QUICK
    recogniser = find_recogniser(bundles)
    found = measure_recordings(recogniser, data, SCRATCH, QUICK_RECORDINGS if is_quick else RecordingsPlan())
    if not is_quick:
        path = result_path("recordings").with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_json(found, describe_setting(tell_command())))
    return render_recordings(found)


def report_long_recordings(bundle: Path, plan: Plan, *, bundles: Path = BUNDLES, data: Path = DATA) -> str:  # noqa: ARG001
    """Share long recordings among ranks."""
    recogniser = find_recogniser(bundles)
    long_plan = QUICK_LONG if plan is QUICK else FULL_LONG
    cells = measure_long_recordings(recogniser, data, SCRATCH / "long-recordings", long_plan)
    return render_long_recordings(cells, f"{recogniser.manifest.name} {recogniser.manifest.version}")


def report_segmentation(bundle: Path, plan: Plan, *, runs: Path = RUNS) -> str:  # noqa: ARG001 - reads finished runs
    """Put the finished runs of segmenters beside each other."""
    found = find_runs(runs)
    if not found:
        raise FileNotFoundError(
            f"{runs} has no finished run of a segmenter; train one, or name another folder by --runs"
        )
    return render_segmenters(measure_segmenters(found, rounds=plan.rounds))


def report_parallel(bundle: Path, plan: Plan) -> str:  # noqa: ARG001 - its models have random weights
    """Count what ranks send and hold, and draw it unless in haste."""
    is_quick = plan is QUICK
    measured = measure_parallel(QUICK_PARALLEL if is_quick else ParallelPlan())
    if is_quick:
        return render_parallel(measured)
    picture = result_path("parallel").with_suffix(".png")
    plot_parallel(measured, picture)
    return f"{render_parallel(measured)}\n\n![Bytes against the length, memory against ranks]({picture.name})"


def report_brain_networks(
    bundle: Path,  # noqa: ARG001 - models are trained
    plan: Plan,
    *,
    rows: Sequence[str] = (),
    tasks: Sequence[str] = (),
    data: Path = DATA,
) -> str:
    """Cross-validate classifiers of brain networks; costs at 200 regions if all; in haste ridge on one task."""
    cells = list_cells(["ridge"], ["mdd"]) if plan is QUICK else list_cells(rows, tasks)
    tables = render_cells(measure_cells(cells, data=data, work=SCRATCH / "brain-networks"))
    is_part = plan is QUICK or rows or tasks
    return tables if is_part else f"{tables}\n\n{render_costs(measure_costs())}"


def report_gpu(bundle: Path, plan: Plan, *, device: str = "cuda:0") -> str:  # noqa: ARG001 - all of them take part
    """Measure every bundle and the attention on a GPU, and draw the latter; in haste, or on the CPU, less of it."""
    is_quick, is_cpu = plan is QUICK, device == "cpu"
    gpu_plan = QUICK_GPU if is_quick else ON_CPU if is_cpu else GpuPlan()
    roots = FP32_ROOTS if is_cpu else (*FP32_ROOTS, *FP16_ROOTS)  # a CPU only casts float16 back and forth
    found = measure_gpu(device, gpu_plan, cache=SCRATCH / "cache", roots=roots)
    parts = [render_gpu(found)]
    if found.attention:
        parts.append(f"## Attention\n\n{render_attention(found.attention)}")
    if found.attention and not is_quick:
        picture = result_path("gpu").with_suffix(".png")
        plot_attention(found.attention, picture)
        parts.append(f"![Time of attention against the length]({picture.name})")
    return "\n\n".join(parts)


def tell_command() -> str:
    """Tell what was typed."""
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def find_missing(what: str, bundles: Path, data: Path, runs: Path = RUNS) -> str | None:
    """Tell what a subject lacks here; it is left out then, or refused if it was asked for by its name."""
    if what == "quality" and not TEST_FILE.exists():
        return f"{TEST_FILE} is not here"
    if what == "explanations" and not EXPLAINED_FILE.exists():
        return f"{EXPLAINED_FILE} is not here"
    if what == "segmentation" and not find_runs(runs):
        return f"{runs} has no finished run of a segmenter"
    if what in {"recordings", "long-recordings", "clustering", "brain-networks"} and not data.is_dir():
        return f"{data} is not here"
    if what in {"recordings", "long-recordings"}:
        try:
            find_recogniser(bundles)
        except FileNotFoundError as error:
            return str(error)
    return None


def report_tcformer(bundle: Path, plan: Plan) -> str:  # noqa: ARG001 - its models have random weights
    """Measure TCFormer's program, and compare the versions."""
    tokens = QUICK_TOKENS if plan is QUICK else TokensPlan()
    return render_token_clustering(measure_token_clustering(SCRATCH / "tcformer", tokens))


REPORTS: dict[str, Callable[[Path, Plan], str]] = {
    "serving": report_serving,
    "robustness": report_robustness,
    "startup": report_startup,
    "attention": report_attention,
    "export": report_export,
    "quality": report_quality,
    "explanations": report_explanations,
    "recordings": report_recordings,
    "long-recordings": report_long_recordings,
    "tcformer": report_tcformer,
    "segmentation": report_segmentation,
    "parallel": report_parallel,
    "clustering": report_clustering,
    "brain-networks": report_brain_networks,
    "gpu": report_gpu,
}
ONLY_IF_NAMED = {"clustering", "brain-networks", "gpu"}  # the first two take long; a GPU is not everywhere


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=REPORTS, help=f"by default all but {' and '.join(sorted(ONLY_IF_NAMED))}"
    )
    parser.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, help=f"a trained bundle ({SHIPPED_BUNDLE})")
    parser.add_argument(
        "--bundles",
        type=Path,
        default=BUNDLES,
        help="for (long-)recordings: folder of bundles, or the recogniser's own",
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help="for recordings, clustering, brain-networks: folder of the data sets"
    )
    parser.add_argument("--quick", action="store_true", help="a minute or so of each; writes no file")
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        default=SPEECH_BUNDLE,
        help=f"for clustering: bundle or finished run of a recogniser that all rows start from ({SPEECH_BUNDLE})",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=CLUSTERING_EPOCHS,
        help=f"for clustering: how long each attention is trained, in passes of 26 steps ({CLUSTERING_EPOCHS})",
    )
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help=f"for segmentation: folder of finished training runs ({RUNS})"
    )
    parser.add_argument("--rows", nargs="+", default=(), help="for brain-networks: keys of rows; all by default")
    parser.add_argument("--tasks", nargs="+", default=(), help="for brain-networks: names of tasks; all by default")
    parser.add_argument("--device", default="cuda:0", help="for gpu: cuda:N or cpu (cuda:0)")
    arguments = parser.parse_args()
    if arguments.what == "gpu" and (fault := find_fault(arguments.device)):
        parser.error(fault)
    clustering = partial(report_clustering, start=arguments.start, epochs=arguments.epochs, data=arguments.data)
    recordings = partial(report_recordings, bundles=arguments.bundles, data=arguments.data)
    reports = REPORTS | {
        "clustering": clustering,
        "recordings": recordings,
        "long-recordings": partial(report_long_recordings, bundles=arguments.bundles, data=arguments.data),
        "segmentation": partial(report_segmentation, runs=arguments.runs),
        "gpu": partial(report_gpu, device=arguments.device),
        "brain-networks": partial(
            report_brain_networks, rows=arguments.rows, tasks=arguments.tasks, data=arguments.data
        ),
    }
    for what in [arguments.what] if arguments.what else [what for what in REPORTS if what not in ONLY_IF_NAMED]:
        missing = find_missing(what, arguments.bundles, arguments.data, arguments.runs)
        if missing and arguments.what:
            parser.error(missing)
        if missing:
            print(f"{what}: not measured, as {missing}")
            continue
        load = os.getloadavg()[0]
        plan = QUICK if arguments.quick else FULL
        body = reports[what](arguments.bundle, plan)
        setting = describe_setting(tell_command())
        name = PROGRAMS_ON_CPU if (what, arguments.device) == ("gpu", "cpu") else what
        text = f"# {name}\n\n{setting}\n- Load average of the machine before the run: {load:.2f}\n\n{body}\n"
        print(text)
        if not arguments.quick:
            path = result_path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"written to {path}", flush=True)


if __name__ == "__main__":
    main()
