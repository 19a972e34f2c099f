"""What the tests of picture models share: pictures, a model whose weights all count, and the law of gradients."""

import torch
from torch import Tensor, nn


def pictures(rows: int, columns: int) -> Tensor:
    """Two pictures, always the same ones: (2, 3, rows, columns)."""
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))


def filled(model: nn.Module) -> nn.Module:
    """Give numbers to what starts at zero, fresh biases and the ends of residual branches: then every path counts."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def assert_gradients_reach_every_parameter(model: nn.Module, *, without_effect: tuple[str, ...] = ()) -> None:
    """After a backward pass; parameters whose names end as told have gradients that are zero but for rounding."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name.endswith(without_effect), name
