import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import QUICK as QUICK_RUN
from benchmarks.__main__ import main, report_gpu
from benchmarks.gpu import QUICK, GpuFinding, Load, measure_gpu, render_gpu
from benchmarks.gpu_attention import AttentionPoint, plot_attention, render_attention
from benchmarks.gpu_contestants import find_folders
from service.devices import open_devices
from tests.service.fake_nvml import FakeNvml

BUNDLE = Path("bundles/thc-aal116-abide")


@pytest.fixture(scope="module")
def finding(tmp_path_factory: pytest.TempPathFactory) -> GpuFinding:
    """The whole command in haste, on the CPU, for one shipped bundle."""
    root = tmp_path_factory.mktemp("gpu")
    shutil.copytree(BUNDLE, root / "bundles" / BUNDLE.name)
    roots = (root / "bundles", root / "absent")
    return measure_gpu("cpu", QUICK, cache=root / "cache", roots=roots)


def test_every_contestant_answers_under_every_load(finding: GpuFinding) -> None:
    assert {load.contestant for load in finding.loads} == {"onnx", "eager"}
    for contestant in ("onnx", "eager"):
        own = [load for load in finding.loads if load.contestant == contestant]
        assert {(load.num_connections, load.num_streams) for load in own} == {(1, 1), (1, 2), (4, 1), (4, 2)}
        assert 1 in {load.max_batch for load in own}
        assert all(load.rate > 0 and load.p99_seconds >= load.p50_seconds > 0 for load in own)
        assert all(load.utilisation is None for load in own)


def test_attention_is_measured_in_all_its_kinds(finding: GpuFinding) -> None:
    assert [point.attention for point in finding.attention] == ["full, torch SDPA", "clustered", "improved"]
    assert all(point.num_tokens == 256 and point.seconds > 0 for point in finding.attention)


def test_the_report_has_a_row_for_each_load() -> None:
    load = Load(
        bundle="bundles/m",
        contestant="onnx",
        max_batch=8,
        num_streams=2,
        num_connections=64,
        rate=1234.4,
        p50_seconds=0.05,
        p99_seconds=0.0712,
        utilisation=0.876,
    )
    text = render_gpu(GpuFinding(device="cuda:0", loads=[load]))
    assert text.splitlines()[0] == "Device: cuda:0"
    assert text.splitlines()[-1] == "| bundles/m | onnx | 8 | 2 | 64 | 1234 | 50.00 | 71.20 | 88% |"


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
        measure_gpu("cuda:0", QUICK, cache=tmp_path)


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


def test_every_shipped_bundle_takes_part() -> None:
    assert BUNDLE in find_folders(gpu.ROOTS)
    assert len(find_folders(gpu.ROOTS[:1])) >= 4


def test_the_command_writes_tables(monkeypatch: pytest.MonkeyPatch, finding: GpuFinding) -> None:
    monkeypatch.setattr("benchmarks.__main__.measure_gpu", lambda *args, **kw: finding)
    text = report_gpu(BUNDLE, QUICK_RUN, device="cpu")
    assert "| bundle | runs |" in text
    assert "| attention | N |" in text
