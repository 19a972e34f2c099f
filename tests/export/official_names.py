"""State dicts as the publishers of PaCa-ViT would have saved them, written without the tables of renames."""

import re

from torch import Tensor, nn

CLUSTERING = {"conv": 0, "hidden": 2, "out": 4}  # places in the official sequence; activations stand between


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a `PaCaViTClassifier` with convolutional clustering, by their official names and with their shapes."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        is_pointwise = re.search(r"clustering\.(hidden|out)\.weight", name)
        state[official_name(name)] = tensor[:, :, None, None] if is_pointwise else tensor
    return state


def official_name(name: str) -> str:
    """The official name of one weight."""
    found = re.fullmatch(r"backbone\.stages\.(\d+)\.(.+)", name)
    if not found:
        return name
    stage, rest = int(found[1]), found[2]
    if rest.startswith("norm."):
        return f"norm{stage + 1}{rest.removeprefix('norm')}"
    if rest.startswith("downsample."):
        part = rest.removeprefix("downsample.").replace("convs", "proj")
        return f"transition{stage}.{part.replace('proj.0', 'proj')}" if stage else f"patch_embed.{part}"
    rest = re.sub(r"\.norm([12])\.", r".norm\1_before.", rest.replace("mlp.conv", "mlp.dwconv.dwconv"))
    rest = re.sub(r"clustering\.(\w+)", lambda match: f"clustering.clustering.{CLUSTERING[match[1]]}", rest)
    return f"stage{stage + 1}.{rest.removeprefix('blocks.').replace('attention', 'attn')}"
