"""Multiply-accumulates of the models of pictures, counted from shapes: `python -m benchmarks.macs`.

The model runs on torch's meta device, which has shapes but no numbers, with a hook on every layer that multiplies.
Counted are linear layers, convolutions, both products of attention, the weighted means that make clusters, distances
between tokens as N²E (inside each part where there are several), and the exchange between dynamic tokens and maps as
one multiplication for each feature of each cell. That is the rule of the official counter, so its figures can be
compared; what a program really does differs: dense exchange multiplies more, some distances are computed a second time
instead of kept (from 4096 tokens on all of them), and those to centers are computed for some tokens only.

Left out: norms, activations, biases, sums and comparisons, which make less than 1 % in all.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models import BUILDERS
from models.paca_blocks import PaCaAttention
from models.paca_seg import PaCaSegHead
from models.tcformer_v2 import ClusterAttention, ClusterBlock
from models.token_blocks import Ctm, TokenAttention, TokenMlp
from models.token_exchange import Links

PICTURES = {  # models of the same task beside each other, with the sides of the pictures
    "classification": (
        ("tcformer-light", "tcformer-base", "tcformer-v2-reconstruction-base", "paca-vit-small"),
        (224,),
    ),
    "segmentation": (("tcformer-fpn-base", "tcformer-v2-reconstruction-fpn-base", "paca-fpn-small"), (224, 512, 1024)),
}
CLASSES = {"classification": 1000, "segmentation": 150}  # ImageNet-1k and ADE20K

_Count = Callable[[nn.Module, tuple[Any, ...], Any], Counter[str]]


def count_macs(model: nn.Module, *, rows: int, columns: int) -> Counter[str]:
    """Count the multiply-accumulates for one picture.

    Args:
        model: of pictures (1, 3, rows, columns), on the meta device or another; its hooks are gone afterwards.
        rows, columns: pixels.
    Returns: counts of "linear", "convolution", "attention", "distances" and "exchange".
    """
    total: Counter[str] = Counter()
    handles = []
    for module in model.modules():
        for kind, count in _COUNTS.items():
            if isinstance(module, kind):
                handles.append(module.register_forward_hook(lambda *call, count=count: total.update(count(*call))))
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, rows, columns, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return total


def _count_linear(module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Counter[str]:
    assert isinstance(module, nn.Linear)
    return Counter(linear=output.numel() * module.in_features)


def _count_convolution(module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Counter[str]:
    assert isinstance(module, nn.Conv2d)
    return Counter(convolution=output.numel() * module.weight[0].numel())


def _count_token_attention(module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Counter[str]:
    assert isinstance(module, TokenAttention)
    x, source, links, _ = inputs
    if module.ratio == 1:
        return Counter(attention=2 * x.numel() * source.shape[1])
    num_keys = (links.grid[0] // module.ratio) * (links.grid[1] // module.ratio)
    return Counter(attention=2 * x.numel() * num_keys) + _count_exchange(links, source.shape[2])


def _count_cluster_attention(_module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Counter[str]:
    x, source = inputs
    return Counter(attention=2 * x.numel() * source.shape[1])


def _count_cluster_block(_module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Counter[str]:
    x, _, last = inputs
    return _count_exchange(last.links, x.shape[2])


def _count_token_mlp(module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Counter[str]:
    assert isinstance(module, TokenMlp)
    x, links = inputs
    exchange = _count_exchange(links, 2 * module.fc1.out_features)
    return exchange if module.skip is None else exchange + Counter(exchange=x.shape[1] * module.fc1.out_features)


def _count_ctm(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Counter[str]:
    assert isinstance(module, Ctm)
    (tokens,) = inputs
    _, source = output
    N, E = source.x.shape[1:]
    exchange = _count_exchange(tokens.links, tokens.x.shape[2]) + _count_exchange(source.links, E)
    return exchange + Counter(distances=N * N * E // module.clustering.num_parts, exchange=N * E)


def _count_exchange(links: Links, dim: int) -> Counter[str]:
    """One way between tokens and a map; tokens that are the cells of that map are only seen differently."""
    if links.token_of_cell is None and links.grid == links.cell_grid:
        return Counter()
    return Counter(exchange=links.cell_grid[0] * links.cell_grid[1] * dim)


def _count_paca_attention(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Counter[str]:
    assert isinstance(module, PaCaAttention)
    x, clusters = inputs[0], output[1]
    if clusters is None:
        return Counter(attention=2 * x.numel() * x.shape[1])
    return Counter(attention=3 * x.numel() * clusters.shape[1])  # the clusters' means, and both products


def _count_paca_head(module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Counter[str]:
    assert isinstance(module, PaCaSegHead)
    scores = output[1]
    dim_in, dim = module.k.fc.in_features, module.k.fc.out_features
    return Counter(attention=scores.numel() * (dim_in + 2 * dim))


_COUNTS: dict[type[nn.Module], _Count] = {
    nn.Linear: _count_linear,
    nn.Conv2d: _count_convolution,
    TokenAttention: _count_token_attention,
    TokenMlp: _count_token_mlp,
    Ctm: _count_ctm,
    ClusterAttention: _count_cluster_attention,
    ClusterBlock: _count_cluster_block,
    PaCaAttention: _count_paca_attention,
    PaCaSegHead: _count_paca_head,
}


def render_macs() -> str:
    """A table of GMAC by kind for the models of `PICTURES`."""
    kinds = ("linear", "convolution", "attention", "distances", "exchange")
    lines = [f"| model | pixels | {' | '.join(kinds)} | GMAC |", "|---" * (len(kinds) + 3) + "|"]
    for task, (names, sides) in PICTURES.items():
        for name in names:
            with torch.device("meta"):
                model = BUILDERS[name](num_classes=CLASSES[task])
            for side in sides:
                macs = count_macs(model, rows=side, columns=side)
                parts = " | ".join(f"{macs[kind] / 1e9:.2f}" for kind in kinds)
                lines.append(f"| {name} | {side} | {parts} | {macs.total() / 1e9:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(render_macs())
