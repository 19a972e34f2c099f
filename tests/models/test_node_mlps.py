from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from models.node_mlps import FactorisedMlp, FlatMlp, Mlp, NodeMlpKind, Readout, VariationalEncoder, make_node_mlp

N, E = 7, 5


def nodes(batch: int = 3) -> Tensor:
    return torch.randn(batch, N, E, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["flat", "shared", "factorised"])
def test_nodes_go_in_and_nodes_come_out(kind: NodeMlpKind) -> None:
    torch.manual_seed(0)
    assert make_node_mlp(kind, N, E, 2 * E, hidden_dim=16)(nodes()).shape == (3, N, 2 * E)


@pytest.mark.parametrize("kind", ["flat", "shared", "factorised"])
def test_what_starts_at_zero_gives_zeros_and_still_learns(kind: NodeMlpKind) -> None:
    torch.manual_seed(0)
    mlp = make_node_mlp(kind, N, E, 2 * E, hidden_dim=16, starts_at_zero=True)
    assert mlp(nodes()).equal(torch.zeros(3, N, 2 * E))
    optimizer = torch.optim.SGD(mlp.parameters(), lr=1.0)
    for _ in range(2):  # the first step reaches the last layer alone
        optimizer.zero_grad()
        (mlp(nodes()) - 1).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mlp.parameters())


@pytest.mark.parametrize(("kind", "sees_others"), [("flat", True), ("shared", False), ("factorised", True)])
def test_only_the_shared_mlp_sees_each_node_alone(kind: NodeMlpKind, *, sees_others: bool) -> None:
    torch.manual_seed(0)
    mlp = make_node_mlp(kind, N, E, E, hidden_dim=16)
    changed = nodes()
    changed[:, 0] += 1
    difference = (mlp(changed) - mlp(nodes())).abs().amax(dim=(0, 2))  # of each node
    assert difference[0] > 1e-3
    assert (difference[1:].max() > 1e-3) == sees_others


def test_the_flat_mlp_is_three_layers_over_all_features() -> None:
    torch.manual_seed(0)
    flat = FlatMlp(N, E, 2, 6)
    x = F.leaky_relu(flat.mlp.fc1(nodes().reshape(3, N * E)), 0.01)
    x = flat.mlp.fc3(F.leaky_relu(flat.mlp.fc2(x), 0.01))
    torch.testing.assert_close(flat(nodes()), x.reshape(3, N, 2), atol=1e-6, rtol=0)


def test_the_factorised_mlp_equals_a_flat_one_whose_layers_are_kronecker_products() -> None:
    torch.manual_seed(0)
    rank, out_dim = 3, 4
    factorised = FactorisedMlp(N, E, out_dim, rank**2).double()
    flat = FlatMlp(N, E, out_dim, rank**2).double()
    ones = partial(torch.ones, dtype=torch.float64)
    with torch.no_grad():
        for parameter in factorised.parameters():
            nn.init.normal_(parameter)
        first, second, last = flat.mlp.fc1, flat.mlp.fc2, flat.mlp.fc3
        f_in, n_in, f_out, n_out = (
            getattr(factorised, name) for name in ("features_in", "nodes_in", "features_out", "nodes_out")
        )
        # Hidden numbers lie feature after feature, with the nodes within; inputs and outputs node after node.
        by_feature = torch.einsum("fe,mn->fmne", f_in.weight, n_in.weight)
        first.weight.copy_(by_feature.reshape(rank**2, N * E))
        first.bias.copy_((f_in.bias[:, None] * n_in.weight.sum(dim=1) + n_in.bias).flatten())
        second.load_state_dict(factorised.hidden.state_dict())
        by_node = torch.einsum("of,nm->nofm", f_out.weight, n_out.weight)
        last.weight.copy_(by_node.reshape(N * out_dim, rank**2))
        last.bias.copy_((n_out.bias[:, None] * (f_out.weight @ ones(rank)) + f_out.bias).flatten())
    x = nodes().double()
    torch.testing.assert_close(factorised(x), flat(x), atol=1e-10, rtol=0)


def test_a_factorised_mlp_needs_a_square() -> None:
    with pytest.raises(ValueError, match="hidden_dim=20 of a factorised MLP must be a square"):
        FactorisedMlp(N, E, E, 20)


def variational() -> VariationalEncoder:
    torch.manual_seed(0)
    encoder = VariationalEncoder(lambda before, after: Mlp(before, (8, 8), after), E)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.4)
    return encoder


def test_evaluation_takes_the_mean_and_training_draws_around_it() -> None:
    encoder, x = variational(), nodes().expand(3, N, E)
    mean, log_variance = encoder.encode(x).chunk(2, dim=-1)
    assert encoder.eval()(x)[0].equal(mean)
    encoder.train()
    with torch.no_grad():
        drawn = torch.stack([encoder(x)[0] for _ in range(4000)])
    deviation = (0.5 * log_variance).exp()
    # Five standard errors of 4000 draws.
    assert ((drawn.mean(dim=0) - mean).abs() < 5 * deviation / 4000**0.5).all()
    assert ((drawn.std(dim=0) / deviation - 1).abs() < 5 / 8000**0.5).all()


def test_the_losses_are_half_the_squared_error_and_the_divergence_from_a_standard_normal() -> None:
    encoder, x = variational().eval(), nodes()
    code, losses = encoder(x)
    mean, log_variance = encoder.encode(x).chunk(2, dim=-1)
    exact = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).mean()
    error = (encoder.decode(code) - x).square().mean() / 2
    assert losses.keys() == {"reconstruction", "divergence"}
    torch.testing.assert_close(losses["divergence"], exact, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(losses["reconstruction"], error, atol=1e-6, rtol=1e-5)


def test_what_is_to_be_given_back_does_not_move_towards_the_decoder() -> None:
    encoder = variational()
    for parameter in encoder.decode.parameters():
        nn.init.zeros_(parameter)
    x = nodes().requires_grad_()
    encoder(x)[1]["reconstruction"].backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_readout_keeps_few_features_of_each_node() -> None:
    torch.manual_seed(0)
    readout = Readout(N, E, reduced_dim=2, hidden_dim=16, num_classes=3)
    x = F.leaky_relu(F.linear(nodes(), readout.reduce.weight, readout.reduce.bias), 0.01).reshape(3, 2 * N)
    torch.testing.assert_close(readout(nodes()), readout.mlp(x), atol=1e-6, rtol=0)
    assert [readout.mlp.fc1.out_features, readout.mlp.fc2.out_features] == [16, 2]
