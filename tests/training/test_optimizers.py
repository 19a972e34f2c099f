from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from models import BUILDERS
from training.optimizers import MuonAdamW, OptimizerConfig, schedule


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "norm": nn.LayerNorm(4),
            "fc": nn.Linear(4, 5),
            "head": nn.Linear(5, 2),
        }
    )


def set_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", ["paca-vit-micro", "paca-vit-tiny"])
def test_every_parameter_belongs_to_exactly_one_optimizer(name: str) -> None:
    model = BUILDERS[name](num_classes=10)
    optimizer = MuonAdamW(model, OptimizerConfig(), num_steps=10)
    addresses = [p.data_ptr() for part in (optimizer.muon, optimizer.adamw) for p in parameters_of(part)]
    assert sorted(addresses) == sorted(p.data_ptr() for p in model.parameters())


def test_muon_gets_the_matrices_inside_and_adamw_the_rest() -> None:
    model = small_model()
    optimizer = MuonAdamW(model, OptimizerConfig(), num_steps=10)
    muon = {p.data_ptr() for p in parameters_of(optimizer.muon)}
    chosen = {name for name, p in model.named_parameters() if p.data_ptr() in muon}
    assert chosen == {"conv.weight", "fc.weight"}


def test_without_a_rate_for_muon_adamw_gets_the_matrices_too() -> None:
    model = small_model()
    optimizer = MuonAdamW(model, OptimizerConfig(muon_lr=0.0), num_steps=10)
    assert parameters_of(optimizer.muon) == []
    assert len(parameters_of(optimizer.adamw)) == len(list(model.parameters()))
    before = deepcopy(model.state_dict())
    set_gradients(model)
    optimizer.step(0)
    assert all(weight.ne(before[name]).any() for name, weight in model.state_dict().items())


def test_vectors_do_not_decay() -> None:
    optimizer = MuonAdamW(small_model(), OptimizerConfig(adamw_weight_decay=0.3), num_steps=10)
    decays = {p.dim() > 1: group["weight_decay"] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert decays == {True: 0.3, False: 0.0}


def test_a_step_changes_every_parameter_and_clears_the_gradients() -> None:
    model = small_model()
    optimizer = MuonAdamW(model, OptimizerConfig(), num_steps=10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model)
    optimizer.step(0)
    for name, parameter in model.named_parameters():
        assert parameter.ne(before[name]).any(), name
        assert parameter.grad is None, name


def test_muon_updates_a_kernel_as_the_matrix_that_shares_its_memory() -> None:
    config = OptimizerConfig(muon_weight_decay=0.0, warmup_share=0.0)
    model = small_model()
    kernel = model["conv"].weight
    matrix = nn.Parameter(kernel.detach().clone().flatten(1))
    reference = torch.optim.Muon(
        [matrix], lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    optimizer = MuonAdamW(model, config, num_steps=10)
    set_gradients(model)
    matrix.grad = kernel.grad.flatten(1)
    optimizer.step(0)
    reference.step()
    torch.testing.assert_close(kernel.flatten(1), matrix, atol=0, rtol=0)


def test_a_restored_optimizer_goes_on_exactly() -> None:
    torch.manual_seed(0)
    models = [small_model(), small_model()]
    optimizers = [MuonAdamW(model, OptimizerConfig(), num_steps=10) for model in models]
    set_gradients(models[0])
    optimizers[0].step(0)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    set_gradients(models[0])
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    for optimizer in optimizers:
        optimizer.step(1)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, atol=0, rtol=0)


def test_the_schedule_rises_to_the_peak_and_falls_to_the_end() -> None:
    shares = [schedule(step, num_steps=100, warmup_share=0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(shares) == shares[9] == shares[10] == 1.0
    assert shares[-1] == pytest.approx(1 / 90)
    assert all(later < earlier for earlier, later in pairwise(shares[10:]))


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_schedule_of_a_very_short_run_stays_within_its_peak(num_steps: int) -> None:
    shares = [schedule(step, num_steps=num_steps, warmup_share=0.05) for step in range(num_steps)]
    assert all(0.0 < share <= 1.0 for share in shares)


def test_rates_follow_the_schedule() -> None:
    config = OptimizerConfig(muon_lr=1.0, adamw_lr=2.0, warmup_share=0.2)
    optimizer = MuonAdamW(small_model(), config, num_steps=10)
    optimizer.step(0)
    assert {group["lr"] for group in optimizer.muon.param_groups} == {0.5}
    assert {group["lr"] for group in optimizer.adamw.param_groups} == {1.0}
