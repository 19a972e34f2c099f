from dataclasses import replace
from typing import Any

import pytest

from models.parallel.__main__ import main
from models.parallel.costs import Workload, usp_bytes
from models.parallel.planner import Question, choose, list_alternatives, render_plan
from models.parallel.prediction import Device, Spread, predict
from models.parallel.topology import parse_topology

WORK = Workload(length=32768, num_heads=32, num_key_heads=8, head_dim=128, item_bytes=2)
DEVICE = Device(flops_per_second=150e12, block_seconds=100e-6, memory_bytes_per_second=2e12)
NODE = "8:nvlink"


def question(topology: str = NODE, **settings: Any) -> Question:
    return Question(work=WORK, topology=parse_topology(topology), device=DEVICE, **settings)


def chosen(asked: Question) -> Spread:
    return choose(list_alternatives(asked)).spread


def test_all_degrees_are_tried_and_layouts_where_they_differ() -> None:
    spreads = [one.spread for one in list_alternatives(question())]
    assert [(one.ulysses, one.ring, one.layout) for one in spreads] == [(u, 8 // u, "basic") for u in (8, 4, 2, 1)]
    causal = [one.spread for one in list_alternatives(question(is_causal=True))]
    assert len(causal) == 1 + 3 * 3
    assert sum(one.layout == "basic" for one in causal) == 4


def test_heads_that_ulysses_cannot_divide_are_refused_with_the_numbers() -> None:
    asked = replace(question(), work=replace(WORK, num_heads=6, num_key_heads=2))
    refused = {one.spread.ulysses: one.refusal for one in list_alternatives(asked) if one.refusal}
    assert refused == {8: "6 heads are no multiple of 8", 4: "6 heads are no multiple of 4"}
    assert chosen(asked).ulysses <= 2


def test_more_ulysses_ranks_than_heads_of_keys_cost_copies_and_are_possible() -> None:
    few, many = (
        predict(
            replace(WORK, num_key_heads=heads),
            Spread(ulysses=8, ring=1),
            parse_topology(NODE),
            DEVICE,
            is_causal=False,
            has_backward=False,
        )
        for heads in (2, 8)
    )
    assert many.sent == usp_bytes(WORK, ulysses=8, ring=1)
    assert few.sent.forward == many.sent.forward
    assert few.sent.backward > many.sent.backward  # gradients of copies are added up in float32
    assert few.memory_bytes == many.memory_bytes


def test_a_fast_link_gets_ulysses_and_a_slow_one_the_ring() -> None:
    assert chosen(question(is_causal=True, has_backward=True)).ulysses == 8
    slow = chosen(question("8:2@20^1", is_causal=True))
    assert slow.ring >= 4
    assert slow.layout == "zigzag"
    # Exchanges stay within nodes, and the ring crosses.
    across = chosen(question("2x4:nvlink/1.25@50", is_causal=True))
    assert (across.ulysses, across.ring) in {(4, 2), (2, 4), (1, 8)}


def test_causal_rings_want_a_balanced_layout() -> None:
    by_layout = {
        layout: predict(
            WORK,
            Spread(ulysses=1, ring=8, layout=layout),
            parse_topology(NODE),
            DEVICE,
            is_causal=True,
            has_backward=False,
        ).compute_seconds
        for layout in ("basic", "zigzag")
    }
    # The last rank computes r - 1/2 blocks of r, where r / 2 would do.
    assert by_layout["basic"] / by_layout["zigzag"] == pytest.approx(2 - 1 / 8, rel=0.15)


def test_hops_that_computing_hides_cost_nothing_and_slow_ones_are_exposed() -> None:
    def exposed(topology: str) -> float:
        found = predict(
            WORK, Spread(ulysses=1, ring=8), parse_topology(topology), DEVICE, is_causal=False, has_backward=False
        )
        return found.exposed_seconds

    assert exposed(NODE) == 0
    hop = 2 * 32768 / 8 * 8 * 128 * 2 / 0.1e9  # keys and values of a rank over 0.1 GB/s
    assert exposed("8:0.1@0") == pytest.approx(7 * hop, rel=0.05)


def test_memory_falls_with_the_ranks_and_a_limit_refuses() -> None:
    def held(topology: str, ring: int) -> int:
        spread = Spread(ulysses=1, ring=ring)
        found = predict(WORK, spread, parse_topology(topology), DEVICE, is_causal=False, has_backward=False)
        return found.memory_bytes

    assert held("8:nvlink", 8) < 0.6 * held("2:nvlink", 2)
    with pytest.raises(ValueError, match=r"no degrees fit.*more than 1 MB"):
        choose(list_alternatives(question(max_memory_bytes=10**6)))


def test_what_makes_no_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="32 heads of queries must be a multiple of 5"):
        list_alternatives(replace(question(), work=replace(WORK, num_key_heads=5)))
    with pytest.raises(ValueError, match="length=0"):
        list_alternatives(replace(question(), work=replace(WORK, length=0)))


def test_the_table_has_all_ways_and_clusters_where_asked() -> None:
    text = render_plan(question(is_causal=True), num_clusters=256)
    assert text.startswith("ulysses=")
    assert text.count("| chosen |") == 1
    assert text.count("zigzag") >= 3
    assert "| clustered | | 256 clusters |" in text


def test_the_command_prints_a_plan_and_refuses_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "--heads", "8", "--length", "8192", "--topology"]
    main([*plan, "2x4:nvlink/ib", "--causal", "--backward", "--key-heads", "2"])
    assert capsys.readouterr().out.startswith("ulysses=")
    for topology, options, said in (
        ("2x4:nvlink", [], "one link each"),
        ("4:ib", ["--teraflops", "0"], "teraflops=0.0"),
        ("3:ib", ["--max-memory", "0"], "8 heads are no multiple of 3"),
    ):
        with pytest.raises(SystemExit):
            main([*plan, topology, *options])
        assert said in capsys.readouterr().err
