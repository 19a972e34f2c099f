"""Official checkpoints under our names: a table of renames for each architecture.

A table is a list of (pattern, replacement); the first pattern that matches a whole name renames it.
Missing and unexpected names are errors, so that a checkpoint never loads in part.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

Renames = Sequence[tuple[str, str]]

_PACA_BLOCK: Renames = (
    (r"norm([12])_before\.(\w+)", r"norm\1.\2"),
    (r"attn\.(q|k|v|proj|cluster_norm)\.(\w+)", r"attention.\1.\2"),
    (r"mlp\.(fc1|fc2)\.(\w+)", r"mlp.\1.\2"),
    (r"mlp\.dwconv\.dwconv\.(\w+)", r"mlp.conv.\1"),
)
_PACA_CLUSTERING: dict[str, Renames] = {
    "conv": (
        (r"attn\.clustering\.clustering\.0\.(\w+)", r"attention.clustering.conv.\1"),
        (r"attn\.clustering\.clustering\.2\.(\w+)", r"attention.clustering.hidden.\1"),
        (r"attn\.clustering\.clustering\.4\.(\w+)", r"attention.clustering.out.\1"),
    ),
    "mlp": (
        (r"attn\.clustering\.clustering\.0\.(\w+)", r"attention.clustering.hidden.\1"),
        (r"attn\.clustering\.clustering\.2\.(\w+)", r"attention.clustering.out.\1"),
    ),
}


def paca_vit_renames(clustering: str, *, num_stages: int) -> Renames:
    """Names of the official PaCa-ViT classifiers → names of `PaCaViTClassifier`.

    Args:
        clustering: "conv" or "mlp", as in `PaCaViTConfig`.
        num_stages: the official names count stages from 1.
    """
    renames: list[tuple[str, str]] = [
        (r"patch_embed\.proj\.(\d)\.(\w+)", r"backbone.stages.0.downsample.convs.\1.\2"),
        (r"patch_embed\.norm\.(\w+)", r"backbone.stages.0.downsample.norm.\1"),
        (r"head\.(\w+)", r"head.\1"),
    ]
    for stage in range(num_stages):
        ours = rf"backbone.stages.{stage}"
        renames += [
            (rf"norm{stage + 1}\.(\w+)", rf"{ours}.norm.\1"),
            (rf"transition{stage}\.proj\.(\w+)", rf"{ours}.downsample.convs.0.\1"),
            (rf"transition{stage}\.norm\.(\w+)", rf"{ours}.downsample.norm.\1"),
        ]
        for pattern, replacement in (*_PACA_BLOCK, *_PACA_CLUSTERING[clustering]):
            shifted = re.sub(r"\\(\d)", lambda m: rf"\{int(m[1]) + 1}", replacement)
            renames.append((rf"stage{stage + 1}\.(\d+)\.{pattern}", rf"{ours}.blocks.\1.{shifted}"))
    return renames


def load_official(model: nn.Module, state: Mapping[str, Tensor], renames: Renames) -> None:
    """Load an official state dict into one of our models.

    Pointwise convolutions of the official code are linear layers here: (O, I, 1, 1) becomes (O, I).

    Args:
        model: takes the weights in place.
        state: official names → tensors.
        renames: table of the architecture.
    Raises: ValueError naming every tensor that is unknown, missing, doubled or of another shape.
    """
    expected = model.state_dict()
    renamed: dict[str, Tensor] = {}
    faults: list[str] = []
    for name, tensor in state.items():
        target = _rename(name, renames)
        if target is None or target not in expected:
            faults.append(f"unexpected {name}")
        elif target in renamed:
            faults.append(f"{name} comes twice")
        else:
            is_pointwise = tensor.shape[2:] == (1, 1) and expected[target].dim() == 2
            renamed[target] = tensor.flatten(1) if is_pointwise else tensor
    faults += [f"missing {name}" for name in expected if name not in renamed]
    faults += [
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in renamed.items()
        if tensor.shape != expected[name].shape
    ]
    if faults:
        raise ValueError(f"checkpoint does not fit {type(model).__name__}: " + "; ".join(faults))
    model.load_state_dict(renamed)


def _rename(name: str, renames: Renames) -> str | None:
    for pattern, replacement in renames:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None
