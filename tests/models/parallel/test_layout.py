import pytest
import torch

from models.parallel.layout import LAYOUTS, Layout, padded_length, ring_positions, shard_positions


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (1, 4), (4, 1), (2, 2), (2, 3), (4, 2)])
@pytest.mark.parametrize("length", [1, 3, 24, 37])
def test_every_token_has_one_slot_and_padding_comes_last(length: int, layout: Layout, ulysses: int, ring: int) -> None:
    positions = shard_positions(length, layout, ulysses=ulysses, ring=ring)
    assert positions.shape[0] == ulysses * ring
    assert positions.numel() == padded_length(length, layout, ulysses=ulysses, ring=ring)
    assert positions.flatten().sort().values.equal(torch.arange(positions.numel()))
    assert (positions.diff(dim=1) > 0).all()


def test_layouts_are_those_of_the_paper() -> None:
    assert ring_positions(8, "basic", ulysses=1, ring=2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ring_positions(8, "zigzag", ulysses=1, ring=2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert ring_positions(8, "stripe", ulysses=1, ring=2).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert shard_positions(8, "zigzag", ulysses=2, ring=2).tolist() == [[0, 1], [6, 7], [2, 3], [4, 5]]


@pytest.mark.parametrize("layout", ["zigzag", "stripe"])
def test_every_ring_rank_has_the_same_causal_work(layout: Layout) -> None:
    positions = ring_positions(512, layout, ulysses=1, ring=4)
    work = (positions + 1).sum(dim=1)  # keys seen by the queries of each rank
    assert (work.max() - work.min()) / work.min() < 0.05
    basic = (ring_positions(512, "basic", ulysses=1, ring=4) + 1).sum(dim=1)
    assert basic.max() / basic.min() > 5


def test_no_two_ranks_share_a_segment() -> None:
    positions = shard_positions(37, "basic", ulysses=2, ring=1, num_segments=8)
    size = positions.numel() // 8
    assert size == -(-37 // 8)
    assert set((positions[0] // size).tolist()).isdisjoint((positions[1] // size).tolist())
