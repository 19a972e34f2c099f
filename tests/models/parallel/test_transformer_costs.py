from dataclasses import replace

import pytest

from models.parallel.__main__ import main
from models.parallel.prediction import Device
from models.parallel.topology import parse_topology
from models.parallel.transformer_costs import (
    TRANSFORMERS,
    Degrees,
    Step,
    causal_flops,
    count_volumes,
    full_flops,
    list_schemes,
    step_seconds,
)

LLAMA = TRANSFORMERS["llama3-8b"]
STEP = Step(length=65536, batch=8)


def test_weights_are_those_of_the_published_models() -> None:
    # Of the models' cards: 8.03 and 6.74 billion, of which norms are less than 0.3 million.
    assert LLAMA.num_weights == pytest.approx(8.03e9, rel=1e-3)
    assert TRANSFORMERS["llama2-7b"].num_weights == pytest.approx(6.74e9, rel=1e-3)


def test_a_causal_mask_halves_attention_and_nothing_else() -> None:
    attention = 12 * 32 * 8 * 65536**2 * 4096
    assert full_flops(LLAMA, STEP) - causal_flops(LLAMA, STEP) == pytest.approx(attention / 2)
    # The paper's 269.8 TFLOP/s at 208K are 150.9 counted causally.
    long = Step(length=208 * 1024)
    assert 269.8 * causal_flops(LLAMA, long) / full_flops(LLAMA, long) == pytest.approx(150.9, rel=1e-3)


def test_zero_shares_what_it_says_and_its_third_stage_sends_half_as_much_again() -> None:
    stages = [count_volumes(LLAMA, Degrees(data=8, zero=zero), STEP) for zero in range(4)]
    weights = 2 * LLAMA.num_weights
    assert [one.weights_held for one in stages] == [2 * weights, 2 * weights, weights + weights // 8, 2 * weights // 8]
    assert [one.optimiser_held for one in stages] == [6 * weights] + [6 * weights // 8] * 3
    assert [one.weights_sent for one in stages] == [2 * weights * 7 // 8] * 3 + [3 * weights * 7 // 8]


def test_exchanges_send_a_ranks_part_of_what_tensor_parallelism_sends() -> None:
    # Eight gathers of the whole sequence against eight exchanges of an eighth of it, with as many heads of keys.
    model = TRANSFORMERS["llama2-7b"]
    tensor = count_volumes(model, Degrees(tensor=8), STEP).tensor_sent
    exchange = count_volumes(model, Degrees(ulysses=8), STEP).exchange_sent
    assert tensor == 8 * exchange


def test_groups_of_keys_shrink_the_ring_and_not_tensor_parallelism() -> None:
    many = replace(LLAMA, num_key_heads=32)
    ring, ring_of_many = (count_volumes(model, Degrees(ring=8), STEP) for model in (LLAMA, many))
    assert ring_of_many.ring_sent == 4 * ring.ring_sent
    assert ring.exchange_sent == 0
    tensor, tensor_of_many = (count_volumes(model, Degrees(tensor=8), STEP).tensor_sent for model in (LLAMA, many))
    assert tensor == tensor_of_many


def test_every_way_but_data_without_zero_shares_activations() -> None:
    alone = count_volumes(LLAMA, Degrees(), STEP).activations_held
    for degrees in (
        Degrees(tensor=8),
        Degrees(ulysses=8),
        Degrees(ring=8),
        Degrees(ulysses=2, ring=4),
        Degrees(data=8),
    ):
        assert count_volumes(LLAMA, degrees, STEP).activations_held == alone // 8
    # A pipeline holds as many sequences as it has ranks, each of a part of the blocks.
    assert count_volumes(LLAMA, Degrees(pipeline=4), STEP).activations_held == alone // 8
    assert count_volumes(LLAMA, Degrees(pipeline=8), STEP).activations_held == alone // 8


def test_degrees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor=8 times ulysses=8 must divide 32 heads"):
        count_volumes(LLAMA, Degrees(tensor=8, ulysses=8), STEP)
    with pytest.raises(ValueError, match="data=16 must divide a batch of 8"):
        count_volumes(LLAMA, Degrees(data=16), STEP)


def test_schemes_use_all_ranks() -> None:
    schemes = list_schemes(LLAMA, 8, STEP)
    assert {"Ulysses", "ring", "data + ZeRO-1", "USP + ZeRO-3", "tensor", "pipeline"} <= set(schemes)
    assert {one.num_ranks for one in schemes.values()} == {8}


def test_slower_links_make_slower_steps_and_a_ring_hides_them() -> None:
    device = Device(flops_per_second=150e12, block_seconds=1e-4, memory_bytes_per_second=2e12)

    def seconds(links: str, degrees: Degrees) -> float:
        return step_seconds(LLAMA, degrees, STEP, parse_topology(links), device, dense_rate=2e14)

    for degrees in (Degrees(tensor=8), Degrees(ulysses=8), Degrees(ring=8)):
        assert seconds("8:20@5", degrees) > seconds("8:200@5", degrees)
    assert seconds("8:20@5", Degrees(tensor=8)) > 1.5 * seconds("8:20@5", Degrees(ulysses=8))
    assert seconds("8:200@5", Degrees(ulysses=8)) < 1.1 * seconds("8:200@5", Degrees(ring=8))


def test_the_command_prints_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["volumes", "--model", "llama3-8b", "--ranks", "16", "--length", "65536", "--batch", "16"])
    text = capsys.readouterr().out
    assert text.count("\n| ") > 8
    assert "USP + ZeRO-3" in text
    with pytest.raises(SystemExit):
        main(["volumes", "--model", "llama3-8b", "--ranks", "0", "--length", "1"])
    assert "ranks=0" in capsys.readouterr().err
