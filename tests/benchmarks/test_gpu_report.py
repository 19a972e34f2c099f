from benchmarks.gpu_report import GpuFinding, Load, render_gpu


def make_load(contestant: str, rate: float, **facts: object) -> Load:
    usual = {
        "model": "m",
        "bundle": "bundles/m",
        "precision": "fp32",
        "max_batch": 8,
        "num_streams": 2,
        "num_connections": 64,
        "p50_seconds": 0.05,
        "p99_seconds": 0.0712,
        "utilisation": None,
    }
    return Load(contestant=contestant, rate=rate, **usual | facts)  # type: ignore[arg-type]


def make_loads(contestant: str, rate: float, **facts: object) -> list[Load]:
    """Full batches, and one sample alone at a tenth of the rate."""
    alone = {"max_batch": 1, "num_streams": 1, "num_connections": 1, "p50_seconds": 0.002}
    return [make_load(contestant, rate / 10, **alone | facts), make_load(contestant, rate, **facts)]


def read_table(text: str, heading: str) -> list[str]:
    """Rows of the table of a section."""
    section = text.split(f"## {heading}\n")[1].split("\n## ", maxsplit=1)[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


def test_the_report_has_a_row_for_each_load() -> None:
    load = make_load("onnx", 1234.4, utilisation=0.876)
    alone = make_load("onnx", 10.0, max_batch=1, num_connections=1)
    text = render_gpu(GpuFinding(device="cuda:0", loads=[load, alone]))
    assert text.splitlines()[0] == "Device: cuda:0"
    assert read_table(text, "All loads")[0] == "| bundles/m | fp32 | onnx | 8 | 2 | 64 | 1234.4 | 50.00 | 71.20 | 88% |"


def test_each_contestant_is_put_beside_onnx_in_fp32_of_the_same_model() -> None:
    half = {"bundle": "build/fp16/m", "precision": "fp16"}
    loads = [
        *make_loads("onnx", 200.0),
        *make_loads("aotinductor", 300.0),
        *make_loads("onnx", 500.0, **half),
        *make_loads("eager", 80.0, model="other", bundle="bundles/other"),
    ]
    assert read_table(render_gpu(GpuFinding(device="cpu", loads=loads)), "At best") == [
        "| m | fp32 | onnx | 200.0 | 1.00 | 8 | 2 | 64 |  | 20.0 | 50.00 |",
        "| m | fp32 | aotinductor | 300.0 | 1.50 | 8 | 2 | 64 |  | 30.0 | 33.33 |",
        "| m | fp16 | onnx | 500.0 | 2.50 | 8 | 2 | 64 |  | 50.0 | 20.00 |",
        "| other | fp32 | eager | 80.0 |  | 8 | 2 | 64 |  | 8.0 | 125.00 |",
    ]


def test_a_contestant_that_failed_midway_has_no_row_among_the_best_but_those_that_it_made() -> None:
    text = render_gpu(GpuFinding(device="cpu", loads=make_loads("onnx", 20.0)[:1], left_out=["m, onnx: no memory"]))
    assert "- m, onnx: no memory" in text
    assert len(read_table(text, "At best")) == len(read_table(text, "All loads")) == 1


def test_it_says_so_where_nobody_was_left_out() -> None:
    assert "## Left out\n\nNobody." in render_gpu(GpuFinding(device="cpu"))
