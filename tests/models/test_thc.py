from dataclasses import replace
from math import pi
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models import BUILDERS
from models.communities import modularity_loss, store_means
from models.spectra import limit_spectrum
from models.thc import ScoredAttention, Thc
from models.thc_config import THC_CC200, ThcConfig

R, B, NUM_CLASSES = 16, 5, 3
CONFIG = ThcConfig(
    num_regions=R, sizes=(8, 4), hidden_dim=24, encoder_dim=16, readout_dim=4, readout_hidden_dim=16, dropout=0.1
)
VARIANTS: dict[str, ThcConfig] = {
    "default": CONFIG,
    "stored": replace(CONFIG, scope="stored"),
    "batch, flat, no mask, concat": replace(
        CONFIG, scope="batch", encoder="flat", has_top_k_mask=False, readout="concat"
    ),
    "factorised, max, identity, noise": replace(
        CONFIG, encoder="factorised", readout="max", identity_dim=4, has_attention_noise=True
    ),
    "standardised, linear path": replace(CONFIG, is_standardised=True, has_linear_path=True),
    "limited, linear readout, ocread, no encoder": replace(
        CONFIG,
        assignment="ocread",
        encoder="none",
        readout="linear",
        spectrum_limit=0.5,
        is_standardised=True,
        resolutions=(2.0, 1.0),
        has_linear_path=True,
    ),
    "linear readout": replace(CONFIG, readout="linear"),
    "variational, mean": replace(CONFIG, is_variational=True, readout="mean"),
    "variational flat": replace(CONFIG, is_variational=True, encoder="flat"),
    "factorised, skip": replace(CONFIG, encoder="factorised", has_skip=True),
    "variational, skip": replace(CONFIG, is_variational=True, has_skip=True),
    "no encoder, three levels, global": replace(
        CONFIG, encoder="none", sizes=(8, 8, 4), pooling=(True, False, True), readout="global"
    ),
    "ocread, last": replace(CONFIG, assignment="ocread", sizes=(R, 5), pooling=(False, True), readout="last"),
    "ocread, student-t, stored": replace(CONFIG, assignment="ocread", similarity="student-t", scope="stored"),
    "ocread, frozen, random start": replace(
        CONFIG, assignment="ocread", are_centres_frozen=True, has_orthogonal_start=False
    ),
}


def connectivity(batch: int = B, *, num_regions: int = R, seed: int = 1) -> Tensor:
    """Fisher-z correlations of random series."""
    series = torch.randn(batch, num_regions, 40, generator=torch.Generator().manual_seed(seed))
    series[:, 1::2] += series[:, ::2]
    series = series - series.mean(dim=2, keepdim=True)
    series = series / series.norm(dim=2, keepdim=True)
    return (series @ series.transpose(1, 2)).clamp(-0.999, 0.999).atanh() * (1 - torch.eye(num_regions))


def make(config: ThcConfig) -> Thc:
    torch.manual_seed(0)
    model = Thc(config, num_classes=NUM_CLASSES)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or not parameter.any():  # behind what starts at zero nothing would count
            nn.init.normal_(parameter, std=0.1)
    if config.scope == "stored" or config.is_standardised:
        store_means(model, connectivity(12, seed=2))
    return model.eval()


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Thc:
    return make(VARIANTS[request.param])


def does_not_count(model: Thc, name: str) -> bool:
    """A bias of keys adds one number to all scores of a query: the softmax over keys ignores it, and so do centres."""
    level = name.removeprefix("levels.").split(".")[0]
    return name.endswith("attention.k.bias") and (
        model.config.assignment == "ocread" or not model.config.pooling[int(level)]
    )


# Laws


@torch.no_grad()
def test_it_gives_logits_and_the_communities_of_each_level(model: Thc) -> None:
    config = model.config
    logits, assignments, losses = model(connectivity())
    assert logits.shape == (B, NUM_CLASSES)
    assert logits.isfinite().all()
    assert (logits.std(dim=0) > 0).all()
    expected = [
        (B, n, c) for n, c, is_pooled in zip(config.num_nodes, config.sizes, config.pooling, strict=True) if is_pooled
    ]
    assert [tuple(assignment.shape) for assignment in assignments] == expected
    for assignment in assignments:
        is_masked = config.assignment == "learnable" and config.has_top_k_mask
        assert (assignment >= 0).all()
        assert (assignment.sum(dim=2) <= 1 + 1e-5).all()
        assert ((assignment == 0).sum(dim=2) == (assignment.shape[2] // 2 if is_masked else 0)).all()
    names = {"cluster"} | ({"reconstruction", "divergence"} if config.is_variational else set())
    names |= {"modularity"} if config.resolutions else set()
    assert losses.keys() == names
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())


@torch.no_grad()
def test_a_subject_gives_the_same_alone_and_in_a_batch(model: Thc) -> None:
    if model.config.scope == "batch":
        pytest.skip("the published scope: the test below shows what it does")
    logits, assignments, _ = model(connectivity())
    for i in range(B):
        alone, assignments_alone, _ = model(connectivity()[i : i + 1])
        # Not to the bit: below four rows the matrix products of torch's CPU kernels add in another order.
        torch.testing.assert_close(alone[0], logits[i], atol=1e-6, rtol=0)
        for by_itself, together in zip(assignments_alone, assignments, strict=True):
            torch.testing.assert_close(by_itself[0], together[i], atol=1e-6, rtol=0)


@torch.no_grad()
def test_in_the_published_scope_an_answer_depends_on_the_other_subjects() -> None:
    subjects, others = connectivity(), connectivity(seed=3)
    others[0] = subjects[0]
    published, ours = make(replace(CONFIG, scope="batch")), make(CONFIG)
    assert (published(subjects).logits[0] - published(others).logits[0]).abs().max() > 1e-4
    torch.testing.assert_close(ours(subjects).logits[0], ours(others).logits[0], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["thc-aal116", "bnt-aal116", "brain-mlp-aal116"])
@torch.no_grad()
def test_communities_of_a_subject_are_the_same_to_the_bit_alone_and_in_a_batch(name: str) -> None:
    torch.manual_seed(0)
    model = BUILDERS[name](num_classes=2).eval()
    x = connectivity(3, num_regions=116)
    together = model(x)
    for i in range(3):
        alone = model(x[i : i + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-6, rtol=0)
        for by_itself, of_batch in zip(alone.assignments, together.assignments, strict=True):
            # A flat or factorised encoder has one row a subject, see above; before it every matrix has one a node.
            atol = 0 if by_itself is alone.assignments[0] and name.startswith("thc") else 1e-6
            torch.testing.assert_close(by_itself[0], of_batch[i], atol=atol, rtol=0)


@torch.no_grad()
def test_the_same_input_gives_the_same_output(model: Thc) -> None:
    torch.testing.assert_close(model(connectivity()), model(connectivity()), atol=0, rtol=0)


def test_gradients_reach_every_parameter(model: Thc) -> None:
    logits, _, losses = model.train()(connectivity())
    (logits.square().sum() + sum(losses.values())).backward()
    for name, parameter in model.named_parameters():
        if model.config.are_centres_frozen and name.endswith("centres"):
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or does_not_count(model, name), name


# Defects of the published code


@torch.no_grad()
def test_no_bias_is_lost(model: Thc) -> None:
    model, x = model.double(), connectivity().double()
    before = model(x)
    has_fixed_scores = model.config.scope == "stored"  # what a bias of keys adds reaches nothing but the scores
    for name, parameter in model.named_parameters():
        is_idle = does_not_count(model, name) or (has_fixed_scores and name.endswith(".k.bias"))
        if not name.endswith("bias") or is_idle or ".decode." in name:
            continue
        kept = parameter.clone()
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        after = model(x)
        parameter.copy_(kept)
        differences = [(after.logits - before.logits).abs().max()]
        differences += [(a - b).abs().max() for a, b in zip(after.assignments, before.assignments, strict=True)]
        assert max(differences) > 1e-10, name  # communities that are nearly alike let little of level 2 through
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.LayerNorm)]
    assert all(layer.bias is not None for layer in layers)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients_equals_evaluation_with_them(model: Thc, context: Any) -> None:
    logits, assignments, _ = model(connectivity())
    assert logits.requires_grad
    with context():
        found = model(connectivity())
    torch.testing.assert_close(found.logits, logits.detach(), atol=0, rtol=0)
    torch.testing.assert_close(found.assignments, [x.detach() for x in assignments], atol=0, rtol=0)


@torch.no_grad()
def test_a_call_knows_nothing_of_the_call_before(model: Thc) -> None:
    fresh = make(model.config)(connectivity(seed=5))
    model(connectivity())
    torch.testing.assert_close(model(connectivity(seed=5)), fresh, atol=0, rtol=0)


@torch.no_grad()
def test_a_single_community_holds_everybody_unless_the_published_mask_empties_it() -> None:
    ours = make(replace(CONFIG, sizes=(8, 1)))
    published = make(replace(CONFIG, sizes=(8, 1), min_kept=0))
    level, other = [model.levels[1](torch.randn(B, 8, R)) for model in (ours, published)]
    torch.testing.assert_close(level.assignment, torch.ones(B, 8, 1), atol=0, rtol=0)
    assert (level.nodes.std(dim=0) > 0).any()
    assert not other.assignment.any()
    torch.testing.assert_close(other.nodes, published.levels[1].norm.bias.expand(B, 1, R), atol=0, rtol=0)


# Settings


def test_attention_noise_is_logistic_and_acts_in_training_only() -> None:
    torch.manual_seed(0)
    attention = ScoredAttention(dropout=0.0, has_noise=True)
    q = k = v = torch.zeros(1, 1, 300, 4)
    _, scores = attention(q, k, v, None, None)
    assert abs(scores.mean()) < 0.03  # five standard errors of 90,000 draws
    assert abs(scores.std() - pi / 3**0.5) < 0.03
    _, scores = attention.eval()(q, k, v, None, None)
    assert not scores.any()


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"has_attention_noise": True}, {"is_variational": True}])
@torch.no_grad()
def test_chance_acts_in_training_only(settings: dict[str, Any]) -> None:
    model = make(replace(CONFIG, **({"dropout": 0.0} | settings))).train()
    assert not model(connectivity()).logits.equal(model(connectivity()).logits)
    model.eval()
    assert model(connectivity()).logits.equal(model(connectivity()).logits)


@torch.no_grad()
def test_without_chance_training_gives_what_evaluation_gives() -> None:
    model = make(replace(CONFIG, dropout=0.0))
    expected = model(connectivity())
    torch.testing.assert_close(model.train()(connectivity()), expected, atol=0, rtol=0)


@pytest.mark.parametrize("assignment", ["learnable", "ocread"])
@torch.no_grad()
def test_stored_means_of_a_set_answer_as_the_published_scope_does_on_that_set(assignment: Any) -> None:
    config = replace(CONFIG, assignment=assignment, scope="stored")
    stored, published = (Thc(replace(config, scope=scope), num_classes=2) for scope in ("stored", "batch"))
    published.load_state_dict({k: v for k, v in stored.state_dict().items() if ".shared." not in k})
    stored.train()(connectivity(seed=6))
    store_means(stored, connectivity())
    assert stored.training
    stored.eval()
    expected = published.eval()(connectivity())
    torch.testing.assert_close(stored(connectivity()).logits, expected.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(stored(connectivity()).assignments, expected.assignments, atol=1e-6, rtol=0)
    one = stored(connectivity()[:1])
    torch.testing.assert_close(one.assignments[0][0], expected.assignments[0][0], atol=1e-6, rtol=0)


def test_a_model_that_stores_no_mean_says_so() -> None:
    with pytest.raises(ValueError, match='Thc stores no mean; build it with scope="stored"'):
        store_means(make(CONFIG), connectivity())


@torch.no_grad()
def test_readouts_combine_the_votes_of_all_levels() -> None:
    models = {readout: make(replace(CONFIG, readout=readout)) for readout in ("sum", "mean", "max", "concat")}
    for model in models.values():
        model.load_state_dict(models["sum"].state_dict(), strict=False)
    nodes, votes = connectivity(), []
    for level, read in zip(models["sum"].levels, models["sum"].readouts, strict=True):
        nodes = level(nodes).nodes
        votes.append(read(nodes))
    both = torch.stack(votes)
    expected = {"sum": both.sum(dim=0), "mean": both.mean(dim=0), "max": both.max(dim=0).values}
    expected["concat"] = models["concat"].combine(torch.cat(votes, dim=1))
    for readout, model in models.items():
        torch.testing.assert_close(model(connectivity()).logits, expected[readout], atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_readout_may_see_the_nodes_of_all_levels_or_of_the_last() -> None:
    models = {readout: make(replace(CONFIG, readout=readout)) for readout in ("global", "last")}
    for readout, model in models.items():
        first = model.levels[0](connectivity()).nodes
        last = model.levels[1](first).nodes
        seen = torch.cat([first, last], dim=1) if readout == "global" else last
        assert len(model.readouts) == 1
        torch.testing.assert_close(model(connectivity()).logits, model.readouts[0](seen), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_linear_path_adds_a_weight_for_each_connection_to_what_the_levels_say() -> None:
    plain, model = make(CONFIG), make(replace(CONFIG, has_linear_path=True))
    fresh = Thc(replace(CONFIG, has_linear_path=True), num_classes=NUM_CLASSES)
    assert not fresh.head.weight.any(), "it starts at zero"
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    x = connectivity()
    connections = x[:, *torch.triu_indices(R, R, offset=1)]
    expected = plain(x).logits + connections @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_linear_readout_weighs_each_feature_of_each_node_and_connection() -> None:
    config = replace(CONFIG, readout="linear", has_linear_path=True)
    assert not Thc(config, num_classes=NUM_CLASSES).head.weight.any(), "it starts at zero"
    model, x = make(config), connectivity()
    first = model.levels[0](x).nodes
    last = model.levels[1](first).nodes
    connections = x[:, *torch.triu_indices(R, R, offset=1)]
    assert model.head.in_features == 8 * R + 4 * R + R * (R - 1) // 2
    seen = torch.cat([first.flatten(1), last.flatten(1), connections], dim=1)
    expected = seen @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_spectrum_is_limited_first_and_the_linear_path_sees_the_difference_from_the_mean() -> None:
    settings: dict[str, Any] = {"spectrum_limit": 0.5, "is_standardised": True, "has_linear_path": True}
    plain, model = make(CONFIG), make(replace(CONFIG, **settings))
    ours = ("standard.", "head.")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(ours)})
    stored = limit_spectrum(connectivity(12, seed=2), 0.5)  # of those that `make` stored
    x = limit_spectrum(connectivity(), 0.5)
    spread = stored.var(dim=0, correction=0).mean().sqrt()
    connections = ((x - stored.mean(dim=0)) / spread)[:, *torch.triu_indices(R, R, offset=1)]
    expected = plain(x / spread).logits + model.head(connections)
    torch.testing.assert_close(model(connectivity()).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_modularity_of_a_level_is_that_of_the_regions_in_its_communities() -> None:
    config = replace(CONFIG, assignment="ocread", encoder="none", sizes=(8, 8, 4), pooling=(True, False, True))
    model, x = make(replace(config, resolutions=(2.0, 1.0))), connectivity()
    _, (first, last), losses = model(x)
    expected = modularity_loss(first, x, 2.0) + modularity_loss(first @ last, x, 1.0)
    torch.testing.assert_close(losses["modularity"], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_an_encoder_with_a_skip_starts_as_none() -> None:
    config = replace(CONFIG, assignment="ocread", encoder="factorised", has_skip=True)
    model, without = (
        Thc(c, num_classes=NUM_CLASSES).eval() for c in (config, replace(CONFIG, assignment="ocread", encoder="none"))
    )
    without.load_state_dict({name: weight for name, weight in model.state_dict().items() if ".encoder." not in name})
    torch.testing.assert_close(model(connectivity()).logits, without(connectivity()).logits, atol=0, rtol=0)


def test_identities_tell_regions_apart_that_are_connected_alike() -> None:
    alike = torch.ones(1, R, R)
    for identity_dim, is_apart in ((0, False), (4, True)):
        shares = make(replace(CONFIG, identity_dim=identity_dim))(alike).assignments[0][0]
        assert ((shares - shares[:1]).abs().max() > 1e-3) == is_apart


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"readout": "median"}, "readout=median must be one of sum, mean, max, concat, global, last, linear"),
        ({"encoder": "wide"}, "encoder=wide must be one of none, flat, shared, factorised"),
        ({"scope": "site"}, "scope=site must be one of subject, batch, stored"),
        ({"resolutions": (1.0,)}, "resolutions has 1 entries; 2 levels pool"),
        ({"pooling": (True,)}, "pooling has 1 entries; sizes has 2 levels"),
        ({"encoder": "none", "is_variational": True}, 'is_variational needs an encoder; encoder is "none"'),
        ({"encoder": "none", "has_skip": True}, 'has_skip needs an encoder; encoder is "none"'),
        ({"pooling": (False, True)}, "size=8 of a level that does not pool must be its number of nodes, 16"),
        ({"sizes": (8, 9)}, "size=9 exceeds 8: no more communities can start orthogonal"),
        ({"sizes": (17, 2), "assignment": "ocread"}, "size=17 exceeds 16: no more communities can start orthogonal"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)


def test_heads_must_divide_the_features_of_a_region() -> None:
    with pytest.raises(ValueError, match="num_heads=4 must divide model_dim=78"):
        Thc(ThcConfig(num_regions=78, sizes=(40, 4)), num_classes=2)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_published_layout_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = BUILDERS["thc-cc200-official"](num_classes=2)
    assert count_parameters(model) == 125_255_996  # SPEC of THC, section 2.5


@pytest.mark.parametrize("encoder", ["shared", "factorised"])
def test_a_small_encoder_leaves_less_than_five_million_parameters(encoder: Any) -> None:
    with torch.device("meta"):
        model = Thc(replace(THC_CC200, encoder=encoder), num_classes=2)
    assert count_parameters(model) < 5_000_000


# Export


class Program(nn.Module):
    """What a bundle's program answers: no losses."""

    def __init__(self, model: Thc) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits, assignments, _ = self.model(x)
        return logits, *assignments


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch 2.13's exporter
@pytest.mark.parametrize("name", ["default", "stored", "factorised, max, identity, noise", "ocread, student-t, stored"])
def test_the_exported_program_gives_the_same_at_other_batch_sizes(name: str) -> None:
    model = make(VARIANTS[name])
    program = torch.onnx.export(
        Program(model).eval(),
        (connectivity(2),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name

    def run(x: Tensor) -> list[np.ndarray]:
        return session.run(None, {given: x.numpy()})

    for size in (1, 3, 7):
        x = connectivity(size)
        with torch.no_grad():
            expected = Program(model)(x)
        together = run(x)
        for found, wanted in zip(together, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=0)
        for i in range(size):  # what the service runs gives the same alone and in a batch, to the bit
            for alone, of_batch in zip(run(x[i : i + 1]), together, strict=True):
                assert np.array_equal(alone[0], of_batch[i])
