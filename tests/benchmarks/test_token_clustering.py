import numpy as np
import pytest
import torch

from benchmarks import picture_worker
from benchmarks.picture_worker import PictureFinding
from benchmarks.scattered_exchange import scatter_to_map, with_scattered_exchange
from benchmarks.token_clustering import (
    EAGER,
    PROGRAM,
    SCATTER,
    Finding,
    Timing,
    VersionFinding,
    render_token_clustering,
)
from models import token_blocks
from service.bundle import Parity
from tests.export.tiny_pictures import CLASSIFIERS, SEGMENTERS, make_picture_model

MEGABYTES_50 = 50_000_000


@torch.no_grad()
@pytest.mark.parametrize("build", [CLASSIFIERS["tcformer"], SEGMENTERS["tcformer"]], ids=["classifier", "segmenter"])
def test_scattered_exchange_gives_the_same_answers(build: object) -> None:
    model = make_picture_model(build)  # type: ignore[arg-type]
    image = torch.randn(2, 3, 44, 60, generator=torch.Generator().manual_seed(0))
    expected, expected_clusters = model(image)
    with with_scattered_exchange():
        assert vars(token_blocks)["token2map"] is scatter_to_map
        found, clusters = model(image)
    assert vars(token_blocks)["token2map"] is not scatter_to_map, "only inside the block"
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    for one, other in zip(clusters, expected_clusters, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_the_peak_is_what_the_first_call_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_worker, "MAX_CALLS", 1)
    found = picture_worker.measure(lambda: np.ones(MEGABYTES_50, dtype=np.uint8))
    assert 0.9 * MEGABYTES_50 < found.peak_bytes < 1.5 * MEGABYTES_50  # pages that were there before are used again


def test_a_slow_model_is_called_once_and_others_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    assert picture_worker.measure(lambda: calls.append(1)).cpu_seconds < 1
    assert len(calls) == 1 + picture_worker.MAX_CALLS
    monkeypatch.setattr(picture_worker, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(picture_worker, "ENOUGH_SECONDS", 0.0)
    picture_worker.measure(lambda: calls.append(1))
    assert len(calls) == 2 + picture_worker.MAX_CALLS


def test_ratios_are_taken_within_a_round() -> None:
    seconds = {SCATTER: (0.3, 0.9), EAGER: (0.2, 0.6), PROGRAM: (0.1, 0.3)}
    timings = [
        Timing(contestant=name, batch=batch, cpu_seconds=cpu)
        for name in seconds
        for batch in (1, 8)
        for cpu in seconds[name]
    ]
    parity = Parity(
        inputs="8 crops", batch_sizes=(1, 3), max_relative_error={"logits": 6e-7, "clusters_stage2": 0.0},
        share_of_rows_off={"logits": 0.0, "clusters_stage2": 0.0004},
    )  # fmt: skip
    module = PictureFinding(cpu_seconds=1.5, peak_bytes=2 * MEGABYTES_50)
    version = VersionFinding(name="v", side=1024, macs=44_240_000_000, module=module, program=None)
    text = render_token_clustering(Finding(timings=timings, parity=parity, versions=[version]))
    assert "| 8 | program | 200 | 3.00 | 100, 300 |" in text
    assert "| 1 | eager | 400 | 1.50 | 200, 600 |" in text
    assert "| clusters_stage2 | 0.00e+00 | 0.04% |" in text
    assert "| v | 1024 | 44.2 | 1500 | 100 | — | — |" in text
