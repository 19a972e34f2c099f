import pytest
import torch

from benchmarks.full_twin import make_full_twin
from models.clustered_attention import ClusteredAttention
from tests.export.tiny_recogniser import CLUSTERED, CONFIG, FULL, FULL_BELOW, make_recogniser, make_speech_source


@torch.inference_mode()
def test_the_twin_gives_what_the_model_gives_where_that_attends_fully_and_something_else_beyond() -> None:
    model = make_recogniser(CLUSTERED)
    _, twin = make_full_twin(make_speech_source(CLUSTERED), model, recipe="none")
    assert not any(isinstance(part, ClusteredAttention) for part in twin.modules())
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randn(1, 2 * (FULL_BELOW + more), CONFIG.num_mels, generator=generator) for more in (-1, 20))
    lengths = [torch.tensor([features.shape[1]]) for features in (short, long)]
    torch.testing.assert_close(twin(short, lengths[0])[0], model(short, lengths[0])[0], atol=1e-5, rtol=0)
    assert (twin(long, lengths[1])[0] - model(long, lengths[1])[0]).abs().max() > 1e-3


def test_the_twin_has_a_name_of_its_own_and_is_nobodys_default() -> None:
    source = make_speech_source(CLUSTERED).model_copy(update={"default": True})
    facts, _ = make_full_twin(source, make_recogniser(CLUSTERED), recipe="weights of x")
    assert (facts.name, facts.default) == (f"{CLUSTERED}-full", False)
    assert (facts.origin.architecture, facts.origin.recipe) == (f"{CLUSTERED}-full", "weights of x")
    assert facts.spec == source.spec


def test_a_model_that_attends_fully_has_no_twin() -> None:
    with pytest.raises(ValueError, match="is no CTC transformer with clustered attention"):
        make_full_twin(make_speech_source(FULL), make_recogniser(FULL), recipe="none")
