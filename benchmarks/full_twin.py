"""The same recogniser with full attention: a bundle of the same weights, for what clustering costs and saves."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from export.bundles import write_bundle
from export.source import Source, read_source
from models.ctc_transformer import CtcTransformer
from service.bundle import MANIFEST, open_bundle

PLANES = ".planes"  # end of the names of hash planes, which full attention does not have


def open_full_twin(bundle: Path, folder: Path) -> Path:
    """Give the bundle of the twin, exported first if it is not there or of other weights.

    Args:
        bundle: folder of the recogniser with clustered attention.
        folder: of the twin.
    Returns: the folder.
    Raises: ValueError as `make_full_twin`.
    """
    recipe = f"weights of {open_bundle(bundle).sha256}, with full attention"
    if (folder / MANIFEST).exists() and open_bundle(folder).manifest.origin.recipe == recipe:
        return folder
    print(f"exporting {folder}", flush=True)
    source, model = read_source(bundle)
    write_bundle(*make_full_twin(source, model, recipe=recipe), folder)
    return folder


def make_full_twin(source: Source, model: nn.Module, *, recipe: str) -> tuple[Source, CtcTransformer]:
    """Put full attention in place of clustered, without retraining.

    Args:
        source: facts about the weights.
        model: with the weights.
        recipe: what the twin's manifest tells about its origin.
    Raises: ValueError if the model is no CTC transformer with clustered attention.
    """
    if not isinstance(model, CtcTransformer) or model.config.attention is None:
        raise ValueError(f"{source.name} is no CTC transformer with clustered attention; name a bundle of one")
    twin = CtcTransformer(replace(model.config, attention=None), num_classes=model.head.out_features)
    twin.load_state_dict({name: w for name, w in model.state_dict().items() if not name.endswith(PLANES)})
    origin = source.origin.model_copy(update={"architecture": f"{source.origin.architecture}-full", "recipe": recipe})
    facts = {"name": f"{source.name}-full", "origin": origin, "default": False}
    return source.model_copy(update=facts), twin.eval()
