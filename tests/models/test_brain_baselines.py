import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.brain_baselines import BntConfig, BrainMlp, BrainMlpConfig, BrainNetworkTransformer
from models.checkpoints import BNT, drop_encoder_aliases, load_official, split_in_projections
from tests.oracles import brain_network_transformer as oracle

R, C, B, NUM_CLASSES = 12, 5, 4, 3
BNT_CONFIG = BntConfig(num_regions=R, num_communities=C, hidden_dim=20)
MLP_CONFIG = BrainMlpConfig(num_regions=R, hidden_dims=(8, 6))


def connectivity(dtype: torch.dtype = torch.float32) -> Tensor:
    half = torch.randn(B, R, R, generator=torch.Generator().manual_seed(1), dtype=dtype).triu(1) / 2
    return half + half.transpose(1, 2)


@pytest.fixture(params=["bnt", "mlp"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "bnt":
        return BrainNetworkTransformer(BNT_CONFIG, num_classes=NUM_CLASSES).eval()
    return BrainMlp(MLP_CONFIG, num_classes=NUM_CLASSES).eval()


@torch.no_grad()
def test_a_subject_gives_the_same_alone_and_in_a_batch(model: nn.Module) -> None:
    logits, assignments, _ = model(connectivity())
    assert logits.shape == (B, NUM_CLASSES)
    for i in range(B):
        alone, assignments_alone, _ = model(connectivity()[i : i + 1])
        torch.testing.assert_close(alone[0], logits[i], atol=1e-6, rtol=0)
        for by_itself, together in zip(assignments_alone, assignments, strict=True):
            torch.testing.assert_close(by_itself[0], together[i], atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_same_input_gives_the_same_output(model: nn.Module) -> None:
    torch.testing.assert_close(model(connectivity()), model(connectivity()), atol=0, rtol=0)


def test_gradients_reach_every_parameter(model: nn.Module) -> None:
    logits, _, losses = model(connectivity())
    (logits.square().sum() + sum(losses.values())).backward()
    for name, parameter in model.named_parameters():
        if name == "communities.centres":
            assert parameter.grad is None  # frozen
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Softmax ignores what the bias of keys adds to all of them.
        assert parameter.grad.any() or name.endswith("attention.k.bias"), name


@torch.no_grad()
def test_chance_acts_in_training_only(model: nn.Module) -> None:
    model.train()
    assert not model(connectivity()).logits.equal(model(connectivity()).logits)


@torch.no_grad()
def test_the_brain_network_transformer_equals_one_of_torch_under_its_official_names() -> None:
    torch.manual_seed(0)
    theirs = oracle.build(R, C, hidden_dim=20, num_classes=NUM_CLASSES)
    ours = BrainNetworkTransformer(BNT_CONFIG, num_classes=NUM_CLASSES).double().eval()
    load_official(ours, drop_encoder_aliases(split_in_projections(theirs.state_dict())), BNT)
    logits, assignments, _ = ours(connectivity(torch.float64))
    expected, assignment = oracle.classify(theirs, connectivity(torch.float64))
    assert assignment.std() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(assignments, [assignment], atol=1e-10, rtol=0)


def test_centres_start_orthogonal_and_stay() -> None:
    centres = BrainNetworkTransformer(BNT_CONFIG, num_classes=2).communities.centres
    products = centres @ centres.T
    assert not centres.requires_grad
    torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-6, rtol=0)


def test_there_are_no_more_orthogonal_centres_than_features() -> None:
    with pytest.raises(ValueError, match="num_communities=13 exceeds 12: no more centres can start orthogonal"):
        BrainNetworkTransformer(BntConfig(num_regions=12, num_communities=13), num_classes=2)


@torch.no_grad()
def test_the_mlp_sees_each_connection_once_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, x = BrainMlp(MLP_CONFIG, num_classes=NUM_CLASSES).eval(), connectivity()
    rows, columns = torch.triu_indices(R, R, offset=1)
    edges = x[:, rows, columns]
    for layer in model.hidden:
        edges = F.leaky_relu(layer(edges), 0.01)
    torch.testing.assert_close(model(x).logits, model.head(edges), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(x.triu(1)), model(x), atol=0, rtol=0)
    assert model.hidden[0].in_features == R * (R - 1) // 2
    assert model(x).assignments == []
    assert model(x).losses == {}
