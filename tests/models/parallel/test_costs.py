import pytest

from models.parallel.costs import (
    CLUSTERED_FACTS,
    DENSE_FACTS,
    Workload,
    agreement_bytes,
    assignment_bytes,
    clustered_bytes,
    key_mask_bytes,
    segment_clustered_bytes,
    usp_bytes,
)
from models.parallel.layout import Layout
from tests.models.parallel import laws
from tests.models.parallel.conftest import Run


@pytest.mark.parametrize(
    ("ulysses", "ring", "layout", "kind"),
    [
        (4, 1, "basic", "two heads of keys, other width of values"),
        (1, 4, "stripe", "two heads of keys, other width of values"),
        (2, 2, "zigzag", "as many heads of keys"),
    ],
)
def test_attention_sends_the_bytes_of_the_formula_and_no_others(
    ulysses: int, ring: int, layout: Layout, kind: str, run_ranks: Run
) -> None:
    (H, J, L, D, E), _ = laws.KINDS[kind]
    work = Workload(length=L * 100, num_heads=H, num_key_heads=J, head_dim=D, value_dim=E)
    expected = usp_bytes(work, ulysses=ulysses, ring=ring, layout=layout)
    agreement = agreement_bytes(DENSE_FACTS, ulysses=ulysses, ring=ring)
    for seen in run_ranks(4, laws.bytes_of_call, ulysses, ring, layout, kind):
        for formula, (counted, written) in (
            (expected.forward + agreement, seen["forward"]),
            (expected.backward, seen["backward"]),
        ):
            assert counted == formula
            assert counted <= written < 1.02 * counted + 10_000  # headers of gloo's messages


def test_a_mask_of_keys_costs_a_byte_each(run_ranks: Run) -> None:
    (H, J, L, D, E), _ = laws.KINDS["masked keys, a half of them all, and a sample without any"]
    work = Workload(length=L, num_heads=H, num_key_heads=J, head_dim=D, value_dim=E, batch=3)
    expected = key_mask_bytes(work, ulysses=2, ring=2)
    assert run_ranks(4, laws.bytes_of_mask) == [expected] * 4


@pytest.mark.parametrize("num_segments", [1, 8])
def test_clustered_attention_sends_the_bytes_of_the_formula_whatever_the_length(
    num_segments: int, run_ranks: Run
) -> None:
    agreement = agreement_bytes(CLUSTERED_FACTS, ulysses=4, ring=1)
    for length in (70, 200):
        work = Workload(length=length, batch=2, num_heads=6, head_dim=8, value_dim=6)
        formula = clustered_bytes if num_segments == 1 else segment_clustered_bytes
        expected = formula(work, num_ranks=4, num_clusters=16)
        assigned = assignment_bytes(work, num_ranks=4, num_clusters=16) if num_segments == 1 else 0
        for seen in run_ranks(4, laws.clustered_traffic, num_segments, length):
            assert seen["forward"] == expected.forward + agreement
            assert seen["backward"] == expected.backward
            assert seen["assignment"] == assigned + agreement


def test_clustered_attention_sends_an_eighth_of_ulysses_at_8192_tokens_and_less_beyond() -> None:
    shares = []
    for length in (8192, 16384, 90_000):
        work = Workload(length=length, num_heads=8, head_dim=64)
        ulysses = usp_bytes(work, ulysses=4, ring=1).forward
        shares.append(clustered_bytes(work, num_ranks=4, num_clusters=256).forward / ulysses)
    assert shares[0] <= 0.13
    assert shares[1] == pytest.approx(shares[0] / 2, rel=1e-9)
    assert shares[2] < 0.012


def test_improved_attention_goes_the_way_that_sends_less(run_ranks: Run) -> None:
    for num_topics, less in ((4, "fetched"), (100, "by heads")):
        seen = run_ranks(4, laws.improved_traffic, num_topics)
        total = {name: sum(by_rank[name] for by_rank in seen) for name in seen[0]}
        assert total["chosen"] == min(total["fetched"], total["by heads"]) == total[less]
