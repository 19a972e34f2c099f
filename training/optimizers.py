"""Optimisers: Muon for the matrices inside the network, AdamW for everything else, one learning-rate schedule.

Source: Jordan et al. 2024 (Muon, as in `torch.optim.Muon`), scaled to the size of AdamW's updates (Liu et al. 2025).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Learning rates at their peak and decays; the names follow `torch.optim`.

    Attributes:
        muon_lr: for matrices; the update is scaled by 0.2·sqrt(larger side). 0 leaves matrices to AdamW too, as Muon's
            cost grows with the smaller side of a matrix and is out of reach for very large ones.
        adamw_lr: for vectors, depthwise convolutions, the classifier head.
        warmup_share: share of the steps over which the rates rise from 0; then they fall linearly to 0.
    """

    muon_lr: float = 3e-3
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.1
    adamw_lr: float = 2e-3
    adamw_betas: tuple[float, float] = (0.9, 0.98)
    adamw_weight_decay: float = 0.05
    warmup_share: float = 0.05


class MuonAdamW:
    """Both optimisers behind one `step`.

    Convolution kernels (O, I, k, k) are handed to Muon as matrices (O, I·k·k) that share their memory.

    Args:
        model: its parameters are updated in place.
        config: rates and decays.
        num_steps: length of the schedule.
        head: prefix of the parameters that stay with AdamW although they are matrices.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, num_steps: int, head: str = "head.") -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._kernels = [p for name, p in named if config.muon_lr and _is_matrix(p) and not name.startswith(head)]
        chosen = {id(p) for p in self._kernels}
        rest = [p for _, p in named if id(p) not in chosen]
        self._matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._kernels]
        self._config, self._num_steps = config, num_steps
        self.muon = torch.optim.Muon(
            [{"params": self._matrices}],  # a group may be empty, a list of parameters may not
            lr=config.muon_lr,
            momentum=config.muon_momentum,
            weight_decay=config.muon_weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.adamw_weight_decay},
                {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=config.adamw_lr,
            betas=config.adamw_betas,
        )

    def step(self, step: int) -> None:
        """Update with the rates of step `step` (counted from 0) and clear the gradients."""
        share = schedule(step, num_steps=self._num_steps, warmup_share=self._config.warmup_share)
        _set_lr(self.muon.param_groups, self._config.muon_lr * share)
        _set_lr(self.adamw.param_groups, self._config.adamw_lr * share)
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
            kernel.grad = None
        self.muon.step()
        self.adamw.step()
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, object]:
        """State of both, to be saved with `torch.save`."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Take up the state that `state_dict` gave."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def schedule(step: int, *, num_steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate: a linear rise, then a linear fall that would reach 0 after the last step."""
    warmup = max(1, round(warmup_share * num_steps))
    return min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup))


def _is_matrix(p: Tensor) -> bool:
    # A depthwise kernel has one input channel: its rows do not interact, so there is nothing to orthogonalise.
    return p.dim() >= 2 and (p.dim() == 2 or p.shape[1] > 1)


def _set_lr(groups: Iterable[dict[str, object]], lr: float) -> None:
    for group in groups:
        group["lr"] = lr
