"""Official checkpoints under our names: a table of renames for each architecture.

A table is a list of (pattern, replacement); the first pattern that matches a whole name renames it.
Missing and unexpected names are errors, so that a checkpoint never loads in part.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

Renames = Sequence[tuple[str, str]]

SAME_NAMES: Renames = ((r"(.+)", r"\1"),)  # of our own weights

MAX_NAMED = 12  # tensors of one kind of fault; a checkpoint of another model has hundreds

HASH_PLANES = r"(.*\.)?planes"  # buffer of `ClusteredAttention`; the official code draws new ones in every call
STORED_MEANS = r"(.*\.)?shared\.(mean|num_batches)"  # buffers of `communities.SharedMean`; `store_means` fills them

_PROJECTIONS = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))
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


# Official fast-transformers `TransformerEncoder` → `encoder.TransformerEncoder`. It holds no planes.
FAST_TRANSFORMERS_ENCODER: Renames = (
    *((rf"(layers\.\d+\.attention)\.{name}_projection\.(\w+)", rf"\1.{ours}.\2") for name, ours in _PROJECTIONS),
    (r"(layers\.\d+)\.linear(\d)\.(\w+)", r"\1.fc\2.\3"),
    (r"(layers\.\d+\.norm\d|norm)\.(\w+)", r"\1.\2"),
)
# `torch.nn.TransformerEncoder` with `norm_first=False`, after `split_in_projections`.
TORCH_ENCODER: Renames = (
    (r"(layers\.\d+)\.self_attn\.([qkv])\.(\w+)", r"\1.attention.\2.\3"),
    (r"(layers\.\d+)\.self_attn\.out_proj\.(\w+)", r"\1.attention.out.\2"),
    *FAST_TRANSFORMERS_ENCODER[-2:],
)
# `encoder` of a BERT of Hugging Face's transformers, which has no final norm.
BERT_ENCODER: Renames = (
    *(
        (rf"layer\.(\d+)\.attention\.self\.{name}\.(\w+)", rf"layers.\1.attention.{ours}.\2")
        for name, ours in _PROJECTIONS[:3]
    ),
    (r"layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"layers.\1.attention.out.\2"),
    (r"layer\.(\d+)\.attention\.output\.LayerNorm\.(\w+)", r"layers.\1.norm1.\2"),
    (r"layer\.(\d+)\.intermediate\.dense\.(\w+)", r"layers.\1.fc1.\2"),
    (r"layer\.(\d+)\.output\.dense\.(\w+)", r"layers.\1.fc2.\2"),
    (r"layer\.(\d+)\.output\.LayerNorm\.(\w+)", r"layers.\1.norm2.\2"),
)


def _torch_layer(theirs: str, ours: str) -> Renames:
    """Names below one layer of torch's encoder; `theirs` has one group."""
    return (
        (rf"{theirs}\.self_attn\.([qkv])\.(\w+)", rf"{ours}.attention.\2.\3"),
        (rf"{theirs}\.self_attn\.out_proj\.(\w+)", rf"{ours}.attention.out.\2"),
        (rf"{theirs}\.linear(\d)\.(\w+)", rf"{ours}.fc\2.\3"),
        (rf"{theirs}\.(norm\d)\.(\w+)", rf"{ours}.\2.\3"),
    )


_SEQUENTIAL_MLP = (("0", "fc1"), ("2", "fc2"), ("4", "fc3"))  # activations stand between
# Official THC and BNT → `Thc` and `BrainNetworkTransformer`, after `split_in_projections` and `drop_encoder_aliases`.
THC: Renames = (
    (r"node_identity", "identity"),
    *_torch_layer(r"attention_list\.(\d+)\.transformer", r"levels.\1.layer"),
    *((rf"attention_list\.(\d+)\.encoder\.{i}\.(\w+)", rf"levels.\1.encoder.mlp.{fc}.\2") for i, fc in _SEQUENTIAL_MLP),
    (r"attention_list\.(\d+)\.clustering\.assignment", r"levels.\1.communities.weight"),
    (r"attention_list\.(\d+)\.clustering\.assignment\.cluster_centers", r"levels.\1.communities.centres"),
    (r"attention_list\.(\d+)\.norm\.(\w+)", r"levels.\1.norm.\2"),
    (r"readout_list\.(\d+)\.dim_reduction\.0\.(\w+)", r"readouts.\1.reduce.\2"),
    *((rf"readout_list\.(\d+)\.fc\.{i}\.(\w+)", rf"readouts.\1.mlp.{fc}.\2") for i, fc in _SEQUENTIAL_MLP),
    *((rf"readout_list\.\d+\.{i}\.(\w+)", rf"combine.{fc}.\1") for i, fc in _SEQUENTIAL_MLP),
)
BNT: Renames = (
    *_torch_layer(r"attention_list\.(\d+)\.transformer", r"layers.\1"),
    *((rf"attention_list\.1\.encoder\.{i}\.(\w+)", rf"encoder.mlp.{fc}.\1") for i, fc in _SEQUENTIAL_MLP),
    (r"attention_list\.1\.dec\.assignment\.cluster_centers", "communities.centres"),
    (r"dim_reduction\.0\.(\w+)", r"readout.reduce.\1"),
    *((rf"fc\.{i}\.(\w+)", rf"readout.mlp.{fc}.\1") for i, fc in _SEQUENTIAL_MLP),
)


def split_in_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the joint projections of torch's attention: `in_proj_weight` becomes `q.weight`, `k.weight`, `v.weight`.

    Args:
        state: names of `torch.nn.MultiheadAttention` with one embedding dim, other names among them.
    Returns: the same with (3E, E) weights and (3E,) biases in three parts.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        owner, found, kind = name.rpartition("in_proj_")
        if found:
            split |= {f"{owner}{part}.{kind}": piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor
    return split


def drop_encoder_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name each encoder of an official THC or BNT once: `….clustering.encoder.0.weight` is `….encoder.0.weight`.

    The official modules hold the same encoder twice; a state dict may have both names or either.

    Args:
        state: official names → tensors.
    Raises: ValueError if two names of a tensor hold different numbers.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = re.sub(r"^(attention_list\.\d+)\.(?:clustering|dec)(\.encoder\.)", r"\1\2", name)
        if plain in named and not named[plain].equal(tensor):
            raise ValueError(f"{plain} and its alias under clustering or dec hold different numbers")
        named[plain] = tensor
    return named


def load_official(model: nn.Module, state: Mapping[str, Tensor], renames: Renames, *, kept: str | None = None) -> None:
    """Load an official state dict into one of our models.

    Pointwise convolutions of the official code are linear layers here: (O, I, 1, 1) becomes (O, I).

    Args:
        model: takes the weights in place.
        state: official names → tensors.
        renames: table of the architecture.
        kept: pattern of our names that the state need not hold, since official code has nothing for them; these
            tensors keep their values. `HASH_PLANES` is one.
    Raises: ValueError naming the tensors that are unknown or doubled, missing, or of another shape, up to `MAX_NAMED`
        of each and the number of the others.
    """
    expected = model.state_dict()
    renamed: dict[str, Tensor] = {}
    strays: list[str] = []
    for name, tensor in state.items():
        target = _rename(name, renames)
        if target is None or target not in expected:
            strays.append(f"unexpected {name}")
        elif target in renamed:
            strays.append(f"{name} comes twice")
        else:
            is_pointwise = tensor.shape[2:] == (1, 1) and expected[target].dim() == 2
            renamed[target] = tensor.flatten(1) if is_pointwise else tensor
    missing = [name for name in expected if name not in renamed]
    absent = [f"missing {name}" for name in missing if not (kept and re.fullmatch(kept, name))]
    misshapen = [
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in renamed.items()
        if tensor.shape != expected[name].shape
    ]
    if faults := [*_shorten(strays), *_shorten(absent), *_shorten(misshapen)]:
        raise ValueError(f"checkpoint does not fit {type(model).__name__}: " + "; ".join(faults))
    model.load_state_dict(renamed | {name: expected[name] for name in missing})


def _shorten(faults: list[str]) -> list[str]:
    rest = len(faults) - MAX_NAMED
    return [*faults[:MAX_NAMED], f"and {rest} more like it"] if rest > 0 else faults


def _rename(name: str, renames: Renames) -> str | None:
    for pattern, replacement in renames:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None
