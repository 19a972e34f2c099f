import torch

from benchmarks.brain_network_costs import make_subjects, measure_costs, render_costs
from benchmarks.brain_network_rows import ROWS, TASKS


def test_subjects_of_chance_are_symmetric_and_both_labels_are_in_every_fold() -> None:
    subjects = make_subjects(40, 6)
    assert subjects.connectivity.equal(subjects.connectivity.transpose(1, 2))
    assert subjects.connectivity.abs().max() <= 1
    for fold in range(5):
        assert set(subjects.labels[subjects.folds == fold].tolist()) == {0, 1}


def test_a_row_is_trained_and_measured_in_a_process_of_its_own() -> None:
    row = next(row for row in ROWS if row.key == "thc")
    cost = measure_costs(["thc"], num_regions=30)[row.title]
    with torch.device("meta"):
        assert row.make is not None
        model = row.make(30, TASKS["abide-diagnosis"])
    assert cost.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.step_seconds > 0
    assert cost.inference_ms > 0
    assert cost.peak_mb > 50  # torch alone is more
    assert f"| {row.title} | {cost.num_parameters:,} |" in render_costs({row.title: cost})
