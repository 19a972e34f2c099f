import pytest
import torch

from models.parallel.collectives import Communicator
from models.parallel.speech import parallelize
from models.parallel.usp import SequenceParallel
from tests.models.parallel import laws
from tests.models.parallel.conftest import Run

TOLERANCE = 1e-5  # of the largest expected number, of 1 at least


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("attention", laws.ATTENTIONS)
def test_a_spread_recording_gets_the_probabilities_and_gradients_of_one_rank(
    attention: str, num_ranks: int, run_ranks: Run
) -> None:
    for errors in run_ranks(num_ranks, laws.speech_errors, attention):
        assert len(errors) > 30
        assert {name: e for name, e in errors.items() if not e <= TOLERANCE} == {}


def test_training_on_four_ranks_has_the_losses_of_one(run_ranks: Run) -> None:
    alone, by_rank = run_ranks(1, laws.losses, 8)[0], run_ranks(4, laws.losses, 8)
    assert alone[-1] < 0.8 * alone[0]
    for losses in by_rank:
        assert losses == pytest.approx(alone, rel=1e-4)


def test_answers_with_segments_do_not_depend_on_the_number_of_ranks(run_ranks: Run) -> None:
    alone = torch.tensor(run_ranks(1, laws.segmented)[0])
    for num_ranks in (2, 4):
        for found in run_ranks(num_ranks, laws.segmented):
            torch.testing.assert_close(torch.tensor(found), alone, atol=1e-5, rtol=0)


def test_a_halo_wider_than_a_ranks_tokens_is_refused_before_any_message(run_ranks: Run) -> None:
    for said, num_bytes in run_ranks(4, laws.halo_too_wide):
        assert "2 tokens on each of 4 ranks; a convolution borrows 4" in said
        assert num_bytes == 0


def test_the_model_itself_stays_as_it_is_and_weights_keep_their_names() -> None:
    model = laws.make_model("improved")
    names = list(model.state_dict())
    part = parallelize(model, Communicator(None), SequenceParallel(None, None))
    assert list(part.model.state_dict()) == list(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())


def test_layouts_without_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="layout=stripe"):
        parallelize(laws.make_model("full"), Communicator(None), SequenceParallel(None, None, "stripe"))
