import asyncio
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import FULL, main, report_gpu
from benchmarks.__main__ import QUICK as QUICK_RUN
from benchmarks.gpu import ON_CPU, QUICK, measure_gpu
from benchmarks.gpu_attention import AttentionPoint, plot_attention, render_attention
from benchmarks.gpu_report import GpuFinding
from service.batcher import Batcher
from service.bundle import Bundle, open_bundle
from service.devices import open_devices
from service.errors import ModelFailed
from service.metrics import Metrics, ModelMetrics
from service.runtimes.runtime import Runtime
from service.sample import Arrays, Sample
from tests.service.fake_nvml import FakeNvml

BUNDLE, SPEECH = Path("bundles/thc-aal116-abide"), Path("bundles/ctc-transformer-small-an4")
# Compiling takes a minute; see test_gpu_contestants.
NOT_COMPILED = replace(QUICK, contestants=("onnx", "torchscript", "eager"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one shipped bundle in `bundles`."""
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(BUNDLE, folder / "bundles" / BUNDLE.name)
    return folder


@pytest.fixture(scope="module")
def finding(root: Path) -> GpuFinding:
    """The whole command in haste, on the CPU, for one shipped bundle."""
    roots = (root / "bundles", root / "absent")
    return measure_gpu("cpu", NOT_COMPILED, cache=root / "cache", roots=roots)


def test_every_contestant_answers_under_every_load(finding: GpuFinding) -> None:
    assert {load.contestant for load in finding.loads} == {"onnx", "eager"}
    assert {(load.model, load.precision) for load in finding.loads} == {(BUNDLE.name, "fp32")}
    for contestant in ("onnx", "eager"):
        own = [load for load in finding.loads if load.contestant == contestant]
        assert {(load.num_connections, load.num_streams) for load in own} == {(1, 1), (1, 2), (4, 1), (4, 2)}
        assert 1 in {load.max_batch for load in own}
        assert all(load.rate > 0 and load.p99_seconds >= load.p50_seconds > 0 for load in own)
        assert all(load.utilisation is None for load in own)


def test_what_a_bundle_has_no_program_for_is_left_out_with_the_remedy(finding: GpuFinding, root: Path) -> None:
    (line,) = finding.left_out
    assert line.startswith(f"{root / 'bundles' / BUNDLE.name}, torchscript: BundleError: ")
    assert "has no program for torchscript; `make programs` makes one" in line


def test_attention_is_measured_in_all_its_kinds(finding: GpuFinding) -> None:
    kinds = ["full, torch SDPA", "full, torch SDPA, float16", "clustered", "improved"]
    assert [point.attention for point in finding.attention] == kinds
    assert all(point.num_tokens == 256 and point.seconds > 0 for point in finding.attention)


class Broken:
    """Stands for a runtime; adds something to every number, or fails."""

    name, version, device, kernel, num_streams = "broken", "1", "cpu", "portable", 1

    def __init__(self, runtime: Runtime | None, error: Exception | None) -> None:
        self.runtime, self.error = runtime, error

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        if self.error:
            raise self.error
        return {name: array + 1 for name, array in self.runtime.run(inputs, outputs).items()}

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "differs from golden"), (RuntimeError("no more memory\nsecond line"), "no more memory")],
)
def test_a_contestant_that_fails_or_computes_something_else_is_left_out_and_the_rest_go_on(
    monkeypatch: pytest.MonkeyPatch, root: Path, error: Exception | None, reason: str
) -> None:
    open_rightly = gpu.open_contestant

    @contextmanager
    def open_one(bundle: Bundle, name: str, device: str, *, cache: Path) -> Iterator[Runtime]:
        with open_rightly(bundle, "onnx", device, cache=cache) as runtime:
            yield Broken(runtime, error) if name == "eager" else runtime

    monkeypatch.setattr(gpu, "open_contestant", open_one)
    plan = replace(QUICK, contestants=("eager", "onnx"), connections=(1,), streams=(1,), sizes=())
    found = measure_gpu("cpu", plan, cache=root / "cache", roots=(root / "bundles",))
    assert {load.contestant for load in found.loads} == {"onnx"}
    (line,) = found.left_out
    assert f"{BUNDLE.name}, eager: " in line
    assert reason in line
    assert "\n" not in line


def test_attention_is_written_and_drawn(tmp_path: Path) -> None:
    points = [AttentionPoint(attention="full", num_tokens=n, seconds=n / 1e6, peak_bytes=n * 1000) for n in (512, 1024)]
    assert render_attention(points).splitlines()[-1] == "| full | 1024 | 1.02 | 1 |"
    plot_attention(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_the_command_refuses_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu", "--quick"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--device cuda:0, but torch" in (text := capsys.readouterr().err)
    assert "finds no CUDA; install a build of torch with CUDA" in text
    with pytest.raises(RuntimeError, match="finds no CUDA"):
        measure_gpu("cuda:0", QUICK, cache=tmp_path, roots=(Path("bundles"),))


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu.find_fault("cuda:1") is None
    for device in ("cuda:2", "cuda", "gpu"):
        assert gpu.find_fault(device) == f"--device {device}, but torch finds cuda:0, cuda:1; name one of them, or cpu"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_one_command_makes_the_programs_and_measures_them() -> None:
    planned = subprocess.run(["make", "--dry-run", "bench-gpu"], capture_output=True, text=True, check=True).stdout
    steps = ["find_fault", "-m export", "-m benchmarks gpu\n"]
    assert sorted(steps, key=planned.index) == steps


@pytest.mark.skipif(not (shutil.which("make") and Path(".venv/bin/python").exists()), reason="needs make and .venv")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_no_program_is_made() -> None:
    command = ["make", "CUDA=", "--old-file=.venv/.installed-dev", "bench-gpu"]  # installs nothing, however old it is
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode
    assert "finds no CUDA; install a build of torch with CUDA" in refused.stderr
    assert "-m export" not in refused.stdout


def test_folders_without_bundles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no bundle in"):
        measure_gpu("cpu", QUICK, cache=tmp_path, roots=(tmp_path,))


def test_the_utilisation_of_the_gpu_is_collected() -> None:
    devices = open_devices(FakeNvml(2))
    assert devices is not None
    with gpu._watch("cuda:1", devices) as found:
        while not found:
            pass
    assert set(found) == {0.25}


def test_the_part_that_is_not_counted_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SAMPLING_SECONDS", 0.0)
    devices = open_devices(FakeNvml(1))
    with gpu._watch("cuda:0", devices, after_seconds=3600.0) as found:
        threading.Event().wait(0.02)  # one that watches from the begin would look many times
    assert found == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
            "driver 550.54.15",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@dvs)\n",
            "driver 570.86.15",
        ),
        (None, "a driver that does not tell its version"),
    ],
)
def test_the_driver_s_version_is_told(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "version"
    if text:
        file.write_text(text)
    assert gpu.read_driver(file) == told


def test_a_request_that_fails_leaves_no_worker_behind(finding: GpuFinding, root: Path) -> None:
    bundle = open_bundle(root / "bundles" / BUNDLE.name)
    with gpu.open_contestant(bundle, "onnx", "cpu", cache=root / "cache") as runtime:
        metrics = ModelMetrics(Metrics(), "failing")
        batcher = Batcher(Broken(runtime, RuntimeError("no")), metrics, max_batch=1, max_queue=4)
        before = set(threading.enumerate())
        with pytest.raises(ModelFailed):
            asyncio.run(
                gpu._drive(batcher, gpu.cut_samples(bundle), ("logits",), num_streams=2, number=4, plan=NOT_COMPILED)
            )
        assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("device", "longest", "met"), [("cuda:0", 150, (100, 200)), ("cuda:0", 90, (100,)), ("cpu", 150, None)]
)
def test_on_a_gpu_every_length_that_comes_is_met_before_it_counts(
    monkeypatch: pytest.MonkeyPatch, root: Path, device: str, longest: int, met: tuple[int, ...] | None
) -> None:
    bundle = open_bundle(SPEECH)
    manifest = bundle.manifest.model_copy(update={"length_buckets": (100, 200, 400)})
    bundle = replace(bundle, manifest=manifest)
    warmed: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "find_max_batch", lambda *inputs, **settings: 4)
    monkeypatch.setattr(gpu, "cut_samples", lambda bundle: [Sample({}, 20, None), Sample({}, longest, None)])
    monkeypatch.setattr(gpu, "warm_up", lambda *inputs, **settings: warmed.append(settings))
    runtime = Broken(None, None)
    runtime.device = device
    plan = replace(QUICK, connections=())
    assert list(gpu._measure_contestant(bundle, runtime, plan, root)) == []
    found = [(settings["max_batch"], tuple(settings["buckets"])) for settings in warmed]
    assert found == ([(4, met)] if met else [])


def test_the_command_writes_tables(monkeypatch: pytest.MonkeyPatch, finding: GpuFinding) -> None:
    monkeypatch.setattr("benchmarks.__main__.measure_gpu", lambda *args, **kw: finding)
    text = report_gpu(BUNDLE, QUICK_RUN, device="cpu")
    assert "| bundle | precision | runs |" in text
    assert "| attention | N |" in text


@pytest.mark.parametrize(
    ("device", "name", "has_picture"), [("cpu", "programs-on-cpu", False), ("cuda:0", "gpu", True)]
)
def test_results_of_a_cpu_are_never_taken_for_those_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finding: GpuFinding, device: str, name: str, has_picture: bool
) -> None:
    plans = []

    def measure(device: str, plan: gpu.Plan, *, cache: Path, roots: tuple[Path, ...]) -> GpuFinding:
        plans.append(plan)
        assert (Path("build/fp16") in roots) == (device != "cpu")
        return finding if plan.sizes else replace(finding, attention=[])

    monkeypatch.setattr("benchmarks.__main__.measure_gpu", measure)
    monkeypatch.setattr("benchmarks.__main__.find_fault", lambda device: None)
    monkeypatch.setattr("benchmarks.machine.RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu", f"--device={device}"])
    main()
    assert plans == [ON_CPU if device == "cpu" else gpu.Plan()]
    assert {path.name.split("_")[0] for path in tmp_path.iterdir()} == {name}
    assert {path.suffix for path in tmp_path.iterdir()} == ({".md", ".png"} if has_picture else {".md"})
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert text.startswith(f"# {name}\n")
    assert FULL.rounds  # main ran in earnest, not in haste
