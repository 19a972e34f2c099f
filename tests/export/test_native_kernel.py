from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from torch import from_numpy
from torch.testing import assert_close

from tests.export.native_operator import (
    DEFAULTS,
    NEEDS_COMPILER,
    OUTPUTS,
    check_equals_oracle,
    expect,
    make_inputs,
    make_model,
    on_each_tier,
    open_session,
    run,
)

pytestmark = NEEDS_COMPILER

# Sizes (B, H, N, S, E, D, P), the samples' lengths where they are not full, settings that differ from the defaults.
Case = tuple[tuple[int, ...], list[int] | None, list[int] | None, dict[str, Any]]
CASES: dict[str, Case] = {
    "plain": ((1, 2, 40, 50, 16, 16, 16), None, None, {"top_k": 0}),
    "improved": ((1, 2, 40, 50, 16, 16, 16), None, None, {}),
    "lengths": ((4, 2, 33, 45, 16, 16, 16), [33, 0, 5, 1], [3, 45, 0, 6], {}),
    "plain-lengths": ((4, 1, 33, 45, 16, 16, 16), [33, 0, 5, 20], [1, 45, 0, 17], {"top_k": 0}),
    "odd-sizes": ((2, 3, 37, 53, 13, 19, 11), [37, 20], [31, 53], {}),
    "head-of-one": ((1, 1, 30, 40, 1, 1, 5), None, None, {}),
    "wide-heads": ((1, 1, 30, 40, 100, 130, 30), None, None, {"scale": 0.1}),
    "one-bit": ((1, 2, 50, 30, 8, 8, 1), None, None, {}),
    "two-bits": ((1, 2, 50, 30, 8, 8, 2), None, None, {"num_iterations": 10}),
    "63-bits": ((1, 2, 90, 30, 32, 8, 63), None, None, {"num_clusters": 20, "num_iterations": 10}),
    "64-bits": ((1, 2, 90, 30, 32, 8, 64), None, None, {"num_clusters": 20, "num_iterations": 10}),
    "one-cluster": ((2, 1, 40, 50, 16, 16, 16), [40, 9], None, {"num_clusters": 1}),
    "more-clusters-than-queries": ((2, 2, 20, 30, 16, 16, 16), [20, 3], None, {"num_clusters": 31}),
    "three-groups-of-clusters": ((1, 2, 300, 60, 16, 16, 40), None, None, {"num_clusters": 70}),
    "one-assignment": ((1, 2, 60, 30, 16, 16, 16), None, None, {"num_iterations": 1}),
    "settled-long-before": ((1, 2, 60, 30, 16, 16, 16), None, None, {"num_iterations": 100}),
    "one-kept-key": ((1, 2, 40, 50, 16, 16, 16), None, None, {"top_k": 1}),
    "all-but-one-kept": ((2, 1, 40, 50, 16, 16, 16), None, [50, 40], {"top_k": 49}),
    "all-kept": ((2, 1, 40, 50, 16, 16, 16), None, [50, 40], {"top_k": 50}),
    "more-kept-than-there-are": ((2, 1, 40, 50, 16, 16, 16), None, [50, 7], {"top_k": 2**40}),
    "many-keys": ((1, 1, 60, 900, 16, 16, 16), None, None, {"top_k": 32, "num_clusters": 3}),
    "many-kept": ((1, 1, 60, 900, 16, 16, 16), None, None, {"top_k": 300, "num_clusters": 3}),
    "many-queries": ((1, 1, 2100, 40, 8, 8, 24), [2090], None, {"num_iterations": 3}),
    "full-below": ((4, 2, 40, 50, 16, 16, 16), [40, 20, 20, 40], [50, 50, 30, 30], {"full_below": 35}),
    "full": ((2, 1, 300, 250, 20, 24, 16), [300, 17], [250, 1], {"full_below": 1000}),
    "l2": ((2, 2, 60, 50, 16, 16, 0), [60, 33], None, {"metric": "l2"}),
    "l2-plain": ((1, 2, 60, 50, 13, 9, 0), None, None, {"metric": "l2", "top_k": 0, "num_iterations": 10}),
    "l2-few-queries": ((2, 2, 20, 50, 16, 16, 4), [20, 3], [50, 0], {"metric": "l2", "num_clusters": 33}),
    "l2-many-clusters": ((1, 1, 200, 50, 16, 16, 0), None, None, {"metric": "l2", "num_clusters": 50}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@on_each_tier
def test_the_kernel_equals_the_oracle(tier: str, case: Case) -> None:
    sizes, query_lengths, key_lengths, settings = case
    inputs = make_inputs(sizes, query_lengths, key_lengths)
    check_equals_oracle(run(inputs, domain=tier, **settings), inputs, **settings)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_the_kernel_equals_the_oracle_at_random_sizes_and_settings(num_threads: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    B, H, N, S, E, D = (int(random.integers(1, most)) for most in (4, 4, 90, 250, 40, 40))
    inputs = make_inputs(
        (B, H, N, S, E, D, int(random.integers(1, 65))),
        random.integers(0, N + 1, B).tolist(),
        random.integers(0, S + 1, B).tolist(),
        seed=seed,
    )
    settings: dict[str, Any] = {
        "num_clusters": int(random.integers(1, 60)),
        "num_iterations": int(random.integers(1, 8)),
        "top_k": int(random.integers(0, 40)),
        "scale": float(np.float32(random.uniform(0.05, 1) / E**0.5)),
        "metric": ["lsh", "l2"][seed % 2],
        "full_below": int(random.integers(0, 60)),
    }
    check_equals_oracle(run(inputs, num_threads=num_threads, **settings), inputs, **settings)


@on_each_tier
def test_of_equal_scores_the_first_keys_are_kept(tier: str) -> None:
    # Every key has score 1 with the mean query (1, 0), but not with the queries, so which are kept shows in the output.
    inputs = make_inputs((1, 1, 2, 1000, 2, 16, 1), None, None)
    inputs["q"] = np.array([[[[1, 1], [1, -1]]]], np.float32)
    inputs["k"][..., 0] = 1
    settings: dict[str, Any] = {"num_clusters": 1, "top_k": 40, "scale": 1.0}
    check_equals_oracle(run(inputs, domain=tier, **settings), inputs, **settings)
    inputs["k"][0, 0, [300, 999], 0] = 2  # the best do not come first
    check_equals_oracle(run(inputs, domain=tier, **settings), inputs, **settings)
    inputs["k"][0, 0, ::2, 0] = -0.0
    inputs["k"][0, 0, 1::2, 0] = 0.0  # zeros of both signs are equal
    check_equals_oracle(run(inputs, domain=tier, **settings), inputs, **settings)


@pytest.mark.parametrize("order", ["ascending", "descending"])
@on_each_tier
def test_kept_keys_are_found_wherever_they_stand(tier: str, order: str) -> None:
    inputs = make_inputs((1, 1, 40, 1500, 1, 16, 4), None, None)
    inputs["q"] = np.abs(inputs["q"])
    inputs["k"].sort(axis=2)
    if order == "descending":
        inputs["k"] = np.ascontiguousarray(inputs["k"][:, :, ::-1])
    settings: dict[str, Any] = {"num_clusters": 3, "top_k": 50, "metric": "l2"}
    check_equals_oracle(run(inputs, domain=tier, **settings), inputs, **settings)


@on_each_tier
def test_equal_queries_are_one_cluster(tier: str) -> None:
    for metric in ("lsh", "l2"):
        inputs = make_inputs((1, 1, 1, 30, 16, 16, 16), None, None)
        inputs["q"] = inputs["q"].repeat(600, axis=2)
        inputs["query_lengths"][:] = 600
        _, clusters = run(inputs, domain=tier, metric=metric)
        assert set(clusters.flat) == {0}


@on_each_tier
def test_scores_far_apart_neither_overflow_nor_vanish(tier: str) -> None:
    inputs = make_inputs((1, 2, 60, 400, 16, 16, 16), None, None)
    inputs["k"] *= 1000
    kinds: list[dict[str, Any]] = [{"top_k": 0}, {"top_k": 8}, {"full_below": 1000}]
    for settings in kinds:
        out, _ = run(inputs, domain=tier, **settings)
        expected, _ = expect(inputs, **settings)
        # Scores reach some thousand, where the float32 numbers lie 2e-4 apart; so far are weights off.
        assert_close(from_numpy(out).double(), from_numpy(expected), atol=3e-3, rtol=0)


@on_each_tier
def test_weights_sum_to_one(tier: str) -> None:
    inputs = make_inputs((1, 2, 100, 700, 16, 24, 16), None, None)
    inputs["v"][:] = 1
    kinds: list[dict[str, Any]] = [{"top_k": 0}, {"top_k": 32}, {"full_below": 1000}]
    for settings in kinds:
        out, _ = run(inputs, domain=tier, **settings)
        assert_close(from_numpy(out), from_numpy(np.ones_like(out)), atol=2e-6, rtol=0)


@on_each_tier
def test_an_input_that_is_not_a_number_stays_in_its_sample(tier: str) -> None:
    inputs = make_inputs((3, 1, 40, 300, 16, 16, 16), None, None)
    expected = run(inputs, domain=tier)
    inputs["q"][1], inputs["k"][1], inputs["v"][1] = np.nan, np.inf, -np.inf
    found = run(inputs, domain=tier)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x[[0, 2]], y[[0, 2]])
    assert np.isnan(found[0][1]).all()


@on_each_tier
def test_weights_are_right_to_seven_digits_however_small(tier: str) -> None:
    scores = np.linspace(-80, 0, 4001, dtype=np.float32)
    inputs = make_inputs((1, 1, len(scores), 2, 1, 1, 1), None, None)
    inputs["q"][0, 0, :, 0] = scores
    inputs["k"][0, 0, :, 0] = [0, 1]
    inputs["v"][0, 0, :, 0] = [0, 1]
    out, _ = run(inputs, domain=tier, scale=1.0, full_below=10_000)
    weights = np.exp(scores.astype(np.float64))
    error = np.abs(out.flat / (weights / (1 + weights)) - 1)
    assert error[scores > -1].max() < 2e-7
    assert (error < 1e-7 * (1.5 - scores)).all()  # a score's own rounding grows with it


# The same answer, however it is computed

BATCH = ((3, 2, 1300, 400, 20, 20, 40), [1300, 40, 700], [30, 400, 399])


@pytest.mark.parametrize("settings", [{}, {"top_k": 0}, {"metric": "l2"}, {"full_below": 720}], ids=str)
def test_threads_change_no_bit(settings: dict[str, Any]) -> None:
    inputs = make_inputs(*BATCH)
    alone = run(inputs, num_threads=1, num_clusters=50, **settings)
    for found, expected in zip(run(inputs, num_threads=4, num_clusters=50, **settings), alone, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("settings", [{}, {"top_k": 0}, {"metric": "l2"}, {"full_below": 720}], ids=str)
def test_a_sample_alone_equals_that_sample_in_a_batch_to_the_last_bit(settings: dict[str, Any]) -> None:
    inputs = make_inputs(*BATCH)
    out, clusters = run(inputs, num_clusters=50, **settings)
    for b, (n, s) in enumerate(zip(*BATCH[1:], strict=True)):
        single = {
            "q": inputs["q"][[b], :, :n],
            "k": inputs["k"][[b], :, :s],
            "v": inputs["v"][[b], :, :s],
            "planes": inputs["planes"],
            "query_lengths": np.array([n]),
            "key_lengths": np.array([s]),
        }
        alone = run(single, num_clusters=50, **settings)
        np.testing.assert_array_equal(out[[b], :, :n], alone[0])
        np.testing.assert_array_equal(clusters[[b], :, :n], alone[1])
        assert not out[b, :, n:].any()
        assert (clusters[b, :, n:] == 50).all()


def test_calls_beside_each_other_do_not_meet() -> None:
    session = open_session(make_model(DEFAULTS), num_threads=2)
    batches = [make_inputs((1, 2, 100 + 50 * i, 200, 20, 20, 40), None, None, seed=i) for i in range(6)]
    expected = [session.run(OUTPUTS, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(lambda batch: session.run(OUTPUTS, batch), batches * 5)):
            for x, y in zip(found, expected[i % len(batches)], strict=True):
                np.testing.assert_array_equal(x, y)
