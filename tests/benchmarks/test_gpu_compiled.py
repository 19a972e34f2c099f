from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_compiled
from benchmarks.gpu_compiled import compile_program
from export.clustered_operator import replaced_operators
from export.plan import Plan
from export.planners import make_plan
from service.collate import LENGTHS
from tests.export.conftest import quiet_exporter
from tests.export.tiny_recogniser import CLUSTERED, FULL_BELOW, make_recogniser, make_speech_source

CPU = torch.device("cpu")


@pytest.fixture
def plan() -> Iterator[Plan]:
    """A recogniser with clustered attention, on one thread."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_plan(make_speech_source(CLUSTERED), make_recogniser(CLUSTERED))
    torch.set_num_threads(number)


@pytest.mark.slow  # a compiler runs
def test_a_compiled_program_gives_what_the_module_gives_at_sizes_that_it_was_not_compiled_for(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_exporter():
        run = compile_program(plan, CPU, tmp_path)
    tokens = plan.golden[LENGTHS] / 2
    assert tokens.min() < FULL_BELOW < tokens.max()  # row 0, alone, goes the way of short recordings
    for batch in (1, 3, 5):
        inputs = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in plan.golden.items()}
        expected = plan.run(inputs)
        with torch.inference_mode():
            found = run(*(torch.from_numpy(inputs[tensor.name]) for tensor in plan.inputs))
        for name, tensor in zip(plan.output_names, found, strict=True):
            assert tensor.shape == expected[name].shape
            assert np.abs(tensor.numpy() - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max(), name  # float32
    monkeypatch.delattr(gpu_compiled, "aoti_compile_and_package")
    with quiet_exporter():
        compile_program(plan, CPU, tmp_path)  # remembered
        with torch.no_grad():
            next(plan.program.parameters()).add_(1)
        with pytest.raises(NameError):
            compile_program(plan, CPU, tmp_path)  # other weights are compiled anew


def test_in_what_is_compiled_each_clustered_attention_is_one_operator_that_computes_the_same(plan: Plan) -> None:
    inputs = [torch.from_numpy(plan.golden[tensor.name]) for tensor in plan.inputs]
    expected = plan.run(plan.golden)
    with torch.no_grad(), replaced_operators(plan.program, gpu_compiled._call), quiet_exporter():
        found = plan.program(*inputs)
        exported = torch.export.export(plan.program, tuple(inputs))
    for name, tensor in zip(plan.output_names, found, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), expected[name])
    operators = [node for node in exported.graph.nodes if gpu_compiled.OPERATOR in str(node.target).replace(".", "::")]
    assert len(operators) == 2  # layers
    np.testing.assert_array_equal(plan.run(plan.golden)["clusters"], expected["clusters"])  # put back


def test_an_operator_s_outputs_lie_as_what_is_compiled_expects() -> None:
    operator = gpu_compiled._register()
    q = torch.randn(2, 3, 7, 4)
    lengths = torch.tensor([7, 5])
    settings = {"num_clusters": 2, "num_iterations": 1, "top_k": 2, "scale": 0.5, "metric": "lsh", "full_below": 9}
    torch.library.opcheck(operator, (q, q, q, torch.randn(4, 5), lengths, lengths), settings)
