from benchmarks.program import EAGER, PROGRAM, ProgramFinding, Timing, render_program
from service.bundle import Parity


def timing(contestant: str, batch: int, cpu: float) -> Timing:
    return Timing(contestant=contestant, batch=batch, wall_seconds=(cpu, cpu, 3 * cpu), cpu_seconds=(cpu, cpu, 2 * cpu))


def test_the_program_stands_beside_the_module_at_each_batch_size() -> None:
    timings = [
        one for batch in (1, 8) for one in (timing(EAGER, batch, 0.006 * batch), timing(PROGRAM, batch, 0.003 * batch))
    ]
    parity = Parity(
        inputs="17 crops",
        batch_sizes=(1, 3, 8),
        max_relative_error={"logits": 6.66e-7, "clusters": 0.0},
        share_of_rows_off={"clusters": 0.0123},
    )
    text = render_program(ProgramFinding(timings=timings, parity=parity))
    assert "| 1 | ONNX program | 3.00 | 3.00 | 9.00 | 0.500 | 3 |" in text
    assert "| 8 | eager torch | 6.00 | 48.00 | 144.00 | 1.000 | 3 |" in text
    assert "over 17 crops, in batches of (1, 3, 8):" in text
    assert "| logits | 6.66e-07 | 0.00% |" in text
    assert "| clusters | 0.00e+00 | 1.23% |" in text
