import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.layers import ConvMlp, DropPath, drop_path_rates, initialise_linear, map_to_tokens, tokens_to_map


def test_tokens_stand_on_the_map_row_by_row() -> None:
    tokens = torch.arange(6.0).reshape(1, 6, 1)
    expected = torch.tensor([[[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]])
    torch.testing.assert_close(tokens_to_map(tokens, (2, 3)), expected, atol=0, rtol=0)


def test_maps_and_tokens_are_two_views_of_the_same() -> None:
    x = torch.randn(2, 15, 4)
    torch.testing.assert_close(map_to_tokens(tokens_to_map(x, (3, 5))), x, atol=0, rtol=0)


def test_drop_path_does_nothing_outside_of_training() -> None:
    x = torch.randn(8, 3, 4)
    torch.testing.assert_close(DropPath(0.9).eval()(x), x, atol=0, rtol=0)


def test_drop_path_drops_whole_samples_and_scales_up_the_others() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 3, 4)
    factors = DropPath(0.25).train()(x).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), atol=0, rtol=0)
    torch.testing.assert_close(factors.unique(), torch.tensor([0.0, 1 / 0.75]), atol=0, rtol=1e-6)
    torch.testing.assert_close(factors.mean(), torch.tensor(1.0), atol=0.07, rtol=0)  # 4 standard deviations


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_drop_path_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=str(rate)):
        DropPath(rate)


def test_drop_path_rates_rise_evenly_over_all_stages() -> None:
    assert drop_path_rates((2, 1, 2), 0.5) == [[0.0, 0.125], [0.25], [0.375, 0.5]]
    assert drop_path_rates((1,), 0.5) == [[0.0]]


def test_fresh_weights_are_small_and_biases_zero_in_linear_layers_alone() -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(64, 64), nn.LayerNorm(4)
    initialise_linear(linear)
    initialise_linear(norm)
    initialise_linear(nn.Linear(2, 2, bias=False))
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not linear.bias.any()
    assert norm.weight.eq(1).all()


def test_the_convolution_of_the_mlp_is_added_to_the_hidden_layer() -> None:
    torch.manual_seed(0)
    mlp, x = ConvMlp(4, 6), torch.randn(2, 12, 4)
    hidden = mlp.fc1(x)
    mixed = map_to_tokens(mlp.conv(tokens_to_map(hidden, (3, 4))))
    torch.testing.assert_close(mlp(x, (3, 4)), mlp.fc2(F.gelu(hidden + mixed)), atol=1e-6, rtol=1e-5)


def test_the_mlp_sees_no_further_than_the_neighbours_of_a_token() -> None:
    torch.manual_seed(0)
    mlp, x = ConvMlp(4, 6), torch.randn(1, 25, 4)
    changed = x.clone()
    changed[0, 12] += 1.0  # the middle of the grid
    is_changed = (mlp(changed, (5, 5)) != mlp(x, (5, 5))).any(dim=2).reshape(5, 5)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(is_changed, expected)
