import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.parallel.collectives import Communicator
from models.parallel.layout import LAYOUTS, Layout
from models.parallel.ring import ring_backward, ring_forward
from models.parallel.tiles import Heads, Sight
from models.parallel.usp import SequenceParallel
from tests.models.parallel import laws
from tests.models.parallel.cases import Errors
from tests.models.parallel.conftest import Run

FLOAT32, FLOAT64, BFLOAT16 = 1e-5, 1e-12, 2e-2  # of the largest expected number, of 1 at least


def check(errors_by_rank: list[Errors], tolerance: float) -> None:
    assert all(errors_by_rank)
    beyond = [{name: e for name, e in errors.items() if not e <= tolerance} for errors in errors_by_rank]
    assert not any(beyond), beyond


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_any_number_of_ranks_gives_the_answer_of_the_definition(num_ranks: int, run_ranks: Run) -> None:
    check(run_ranks(num_ranks, laws.dense_errors), FLOAT32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.bfloat16, BFLOAT16)])
def test_answers_and_gradients_have_the_type_and_precision_of_the_input(
    dtype: torch.dtype, tolerance: float, run_ranks: Run
) -> None:
    # The official basic ring returns the gradient of queries in bfloat16 whatever the input is.
    check(run_ranks(4, laws.dense_errors, dtype), tolerance)


def test_float32_gradients_are_right_at_every_ring_degree_and_layout(run_ranks: Run) -> None:
    # All official rings return wrong ones above 1: in float32 their sum aliases the buffer of the next block.
    errors_by_rank = run_ranks(4, laws.layout_errors)
    assert {name.split(":")[0] for name in errors_by_rank[0]} == {f"{x} ring={r}" for x in LAYOUTS for r in (2, 4)}
    check(errors_by_rank, FLOAT32)


def test_ulysses_alone_stays_among_its_own_ranks(run_ranks: Run) -> None:
    # The official Ulysses on torch's attention goes round a ring of all processes, whose heads are others.
    assert max(run_ranks(4, laws.groups_of_other_data)) <= FLOAT32


@pytest.mark.parametrize(("ulysses", "ring", "layout"), [(4, 1, "basic"), (1, 4, "stripe"), (2, 2, "zigzag")])
def test_a_causal_answer_does_not_know_the_future(ulysses: int, ring: int, layout: Layout, run_ranks: Run) -> None:
    # Some official kernels are called without a causal mask whatever is asked.
    for past, future in run_ranks(4, laws.changed_by_the_future, ulysses, ring, layout):
        assert past == 0
        assert future > 1e-3


def heads(dtype: torch.dtype, length: int = 600) -> Heads:
    q, k, v = (laws.draw(1, 2, length, 8, seed=i) for i in range(3))
    return Heads(q[:, :, None].to(dtype), k.to(dtype), v.to(dtype))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_sum_exp_is_real_and_wide(dtype: torch.dtype, is_causal: bool) -> None:
    # Officially it is zeros with torch's own kernels, so that blocks are averaged, or narrow as the input is.
    x, positions = heads(dtype), torch.arange(600)
    sight = Sight(positions, positions, is_causal, None)
    answer = ring_forward(x, [sight], Communicator(None), scale=0.5)
    scores = x.q[:, :, 0].double() @ x.k.double().transpose(2, 3) * 0.5
    if is_causal:
        scores = scores.masked_fill(positions[:, None] < positions, -math.inf)
    assert answer.lse.dtype == answer.out.dtype == torch.float32
    torch.testing.assert_close(answer.lse[:, :, 0].double(), scores.logsumexp(dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_ring_of_one_goes_backward(is_causal: bool) -> None:
    # Officially it sends to itself, which gloo cannot. Longer than a tile, so that several are added up.
    x, positions = heads(torch.float64), torch.arange(600)
    sight = Sight(positions, positions, is_causal, None)
    answer = ring_forward(x, [sight], Communicator(None), scale=8**-0.5)
    d_out = laws.draw(1, 2, 1, 600, 8, seed=5, dtype=torch.float64)
    found = ring_backward(x, [sight], answer, d_out, Communicator(None), scale=8**-0.5)
    q, k, v = x
    expected = laws.reference([q[:, :, 0], k, v, d_out[:, :, 0]], None, is_causal=is_causal)
    for name, gradient in zip(("dq", "dk", "dv"), (found.q[:, :, 0], found.k, found.v), strict=True):
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=0)


def alone(layout: Any = "basic", **settings: Any) -> SequenceParallel:
    return SequenceParallel(None, None, layout, **settings)


def three(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "settings", "said"),
    [
        ([(1, 2, 5, 8)] * 3, {"length": 0}, "length=0"),
        ([(1, 2, 5)] * 3, {"length": 5}, r"\(1, 2, 5\)"),
        ([(1, 2, 5, 8), (1, 2, 5, 4), (1, 2, 5, 8)], {"length": 5}, r"k \(1, 2, 5, 4\)"),
        ([(1, 2, 5, 8), (1, 2, 5, 8), (1, 1, 5, 8)], {"length": 5}, r"v \(1, 1, 5, 8\)"),
        ([(0, 2, 5, 8)] * 3, {"length": 5}, r"q \(0, 2, 5, 8\)"),
        ([(1, 2, 5, 8)] * 3, {"length": 6}, "the 6 tokens that rank 0 of 1"),
        ([(1, 3, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)], {"length": 5}, "3 heads of queries .* 2 heads of keys"),
        ([(1, 2, 5, 8)] * 3, {"length": 5, "key_mask": torch.ones(1, 4).bool()}, r"key_mask \(1, 4\)"),
        ([(1, 2, 5, 8)] * 3, {"length": 5, "key_mask": torch.ones(1, 5)}, r"key_mask .*float32"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(
    shapes: list[tuple[int, ...]], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        alone().attend(*three(*shapes), **settings)


def test_types_that_do_not_fit_are_refused() -> None:
    q, k, v = three(*[(1, 2, 5, 8)] * 3)
    with pytest.raises(ValueError, match="float64"):
        alone().attend(q, k, v.double(), length=5)
    with pytest.raises(ValueError, match="int64"):
        alone().attend(*three(*[(1, 2, 5, 8)] * 3, dtype=torch.int64), length=5)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="layout=spiral"):
        alone("spiral")
    with pytest.raises(ValueError, match="timeout_seconds=0"):
        alone(timeout_seconds=0)


def test_heads_that_the_ulysses_degree_does_not_divide_are_refused_before_any_message(run_ranks: Run) -> None:
    for said, num_bytes in run_ranks(4, laws.refused_heads):
        assert "6 heads of queries" in said
        assert "ulysses=4" in said
        assert num_bytes == 0


def test_degrees_that_do_not_divide_the_ranks_are_refused(run_ranks: Run) -> None:
    for said in run_ranks(4, laws.refused_mesh):
        assert "ulysses=3 times ring=1 must divide the 4 ranks" in said


def test_the_mesh_puts_ulysses_ranks_beside_each_other(run_ranks: Run) -> None:
    assert run_ranks(8, laws.places, 2, 2) == [[r // 4, r // 2 % 2, r % 2] for r in range(8)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": 2}, "batch=[1, 2, 1, 2]"),
        ({"is_causal": True}, "is_causal=[0, 1, 0, 1]"),
        ({"has_mask": True}, "has_key_mask=[0, 1, 0, 1]"),
    ],
)
def test_ranks_that_disagree_are_told_on_all_ranks(settings: dict[str, Any], said: str, run_ranks: Run) -> None:
    for message in run_ranks(4, laws.disagree, settings):
        assert said in message
