"""Measure, and write what was measured to `benchmarks/results/`: `python -m benchmarks [SUBJECT]`.

serving     our service beside a plain FastAPI route and the bare ONNX Runtime loop
robustness  bad pictures among good ones, 600 requests at once
startup     from the start of the process to the first answer
attention   full, clustered and improved-clustered attention against the length, with a plot
export      the ONNX program beside eager torch
quality     accuracy on test_dev over HTTP; needs ../shared/data

All of them by default. Machines are noisy: compare numbers of one run only, and close what else runs.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.attention_scaling import Plan as ScalingPlan
from benchmarks.attention_scaling import measure_scaling, plot_scaling, render_scaling
from benchmarks.bundles import open_random_bundle
from benchmarks.machine import describe_setting, result_path
from benchmarks.program import measure_program, render_program
from benchmarks.quality import TEST_FILE, measure_quality, render_quality
from benchmarks.robustness import measure_robustness, render_robustness
from benchmarks.serving import Plan, measure_serving
from benchmarks.serving_report import METHOD, render_bundle
from benchmarks.startup import measure_startup, render_startup

SCRATCH = Path("build/benchmarks")
RANDOM_BUNDLE = SCRATCH / "paca-vit-random"
SHIPPED_BUNDLE = Path("bundles/paca-vit-micro-cifar10")
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


REPORTS: dict[str, Callable[[Path, Plan], str]] = {
    "serving": report_serving,
    "robustness": report_robustness,
    "startup": report_startup,
    "attention": report_attention,
    "export": report_export,
    "quality": report_quality,
}


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=REPORTS, help="by default all")
    parser.add_argument("--bundle", type=Path, default=SHIPPED_BUNDLE, help=f"a trained bundle ({SHIPPED_BUNDLE})")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; writes no file")
    arguments = parser.parse_args()
    for what in [arguments.what] if arguments.what else REPORTS:
        if what == "quality" and not arguments.what and not TEST_FILE.exists():
            print(f"quality: not measured, as {TEST_FILE} is not here")
            continue
        load = os.getloadavg()[0]
        plan = QUICK if arguments.quick else FULL
        body = REPORTS[what](arguments.bundle, plan)
        setting = describe_setting(shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]))
        text = f"# {what}\n\n{setting}\n- Load average of the machine before the run: {load:.2f}\n\n{body}\n"
        print(text)
        if not arguments.quick:
            path = result_path(what)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"written to {path}", flush=True)


if __name__ == "__main__":
    main()
