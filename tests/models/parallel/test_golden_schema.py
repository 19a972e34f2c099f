"""Golden files of the schema with other numbers than the stored ones are found and run, and can fail."""

from pathlib import Path

import numpy as np
import pytest

from tests.models.parallel import made_golden as made
from tests.models.parallel import test_parallel_golden as golden
from tests.models.parallel.conftest import Run

WHOLE = {"lengths": None, "has_gradients": True}
CLUSTERED = {"top_k": 5, "is_segment_local": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden root with files of all kinds."""
    root: Path = tmp_path_factory.mktemp("golden")
    folder = root / golden.SYSTEM
    folder.mkdir()
    made.write_shards(
        folder / "p2_u1r2_stripe_causal.npz", ulysses=1, ring=2, layout="stripe", num_heads=3, num_key_heads=3
    )
    made.write_shards(
        folder / "p8_u2r4_zigzag_causal.npz", ulysses=2, ring=4, layout="zigzag", num_heads=4, num_key_heads=2
    )
    made.write_whole(folder / "p8_global.npz", num_heads=8, num_key_heads=8, length=32, **WHOLE)
    made.write_whole(folder / "p4gqa_global.npz", num_heads=8, num_key_heads=2, length=24, **WHOLE)
    made.write_whole(
        folder / "p4mqa_global.npz", num_heads=4, num_key_heads=1, length=24, lengths=None, has_gradients=False
    )
    made.write_whole(folder / "uneven_L37_P4.npz", num_heads=4, num_key_heads=4, length=37, **WHOLE)
    made.write_whole(
        folder / "uneven_short_L3_P8.npz", num_heads=8, num_key_heads=2, length=3, lengths=[3, 1], has_gradients=True
    )
    made.write_whole(
        folder / "uneven_masked_L41_P2.npz",
        num_heads=2,
        num_key_heads=2,
        length=41,
        lengths=[41, 7, 20],
        has_gradients=True,
    )
    made.write_clustered(folder / "clustered_p4_odd.npz", num_ranks=4, length=61, num_clusters=7, **CLUSTERED)
    made.write_clustered(folder / "clustered_p2_many.npz", num_ranks=2, length=40, num_clusters=30, **CLUSTERED)
    made.write_clustered(
        folder / "clustered_p8_segments.npz",
        num_ranks=8,
        length=64,
        num_clusters=24,
        top_k=3,
        is_segment_local=True,
    )
    return folder


def test_files_with_other_numbers_of_ranks_heads_and_clusters_are_run(
    folder: Path, run_ranks: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLDEN_ROOT", str(folder.parent))
    dense, clustered = golden.dense_files(), golden.clustered_files()
    assert {path.name for path in (*dense, *clustered)} == {path.name for path in folder.iterdir()}
    for path in dense:
        golden.test_golden_outputs_and_gradients_of_parallel_attention_are_reproduced(path, run_ranks)
    for path in clustered:
        golden.test_golden_outputs_and_gradients_of_parallel_clusters_are_reproduced(path, run_ranks)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("p2_u1r2_stripe_causal", "rank1.dk"),
        ("p4mqa_global", "causal.out"),
        ("uneven_masked_L41_P2", "full.out"),
        ("clustered_p4_odd", "improved.out"),
    ],
)
def test_a_wrong_number_in_one_place_is_noticed(
    name: str, changed: str, folder: Path, run_ranks: Run, tmp_path: Path
) -> None:
    with np.load(folder / f"{name}.npz") as file:
        stored = {key: file[key] for key in file.files}
    stored[changed].flat[0] += 1e-3
    path = tmp_path / f"{name}.npz"
    np.savez(path, **stored)
    run = (
        golden.test_golden_outputs_and_gradients_of_parallel_clusters_are_reproduced
        if name.startswith("clustered")
        else golden.test_golden_outputs_and_gradients_of_parallel_attention_are_reproduced
    )
    with pytest.raises(AssertionError, match=changed.split(".")[1]):
        run(path, run_ranks)
