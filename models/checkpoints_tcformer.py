"""Renames of the official TCFormer checkpoints, of PaCa-ViT's teacher and of its segmentation models.

Source: `tcformer.py`, `mta_block.py` (github.com/zengwang430521/TCFormer @1ea72a8); `paca_vit.py`, `paca_head.py`
(github.com/iVMCL/PaCaViT @4307018).
"""

from collections.abc import Mapping

from torch import Tensor, nn

from models.checkpoints import Renames, load_official, paca_vit_renames

_TOKEN_BLOCK: Renames = (
    (r"norm([12])\.(\w+)", r"norm\2.\3"),
    (r"attn\.(q|kv|proj|norm)\.(\w+)", r"attention.\2.\3"),
    (r"attn\.sr\.(\w+)", r"attention.reduce.\2"),
    (r"mlp\.(fc1|fc2)\.(\w+)", r"mlp.\2.\3"),
    (r"mlp\.dwconv\.skip\.weight", r"mlp.skip"),
    (r"mlp\.dwconv\.(?:dwconv\.)?(\w+)", r"mlp.conv.\2"),  # the first stage has one `dwconv` more
)


def tcformer_renames(*, num_stages: int) -> Renames:
    """Names of official classifiers, and of whole-body pose models with their neck → names of `tcformer`'s models.

    Args:
        num_stages: the official names count stages from 1.
    """
    prefix = r"(?:backbone\.)?"  # of pose models
    renames: list[tuple[str, str]] = [
        (rf"{prefix}patch_embed1\.proj\.(\w+)", r"backbone.embed.\1"),
        (rf"{prefix}patch_embed1\.norm\.(\w+)", r"backbone.embed_norm.\1"),
        (r"(?:keypoint_head\.final_layer|head)\.(\w+)", r"head.\1"),
        (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"neck.laterals.\1.\2"),
        (r"neck\.extra_convs\.(\d+)\.conv\.(\w+)", r"neck.extra.\1.\2"),
        *((rf"neck\.merge_blocks\.(\d+)\.{name}", rf"neck.blocks.\1.{ours}") for name, ours in _TOKEN_BLOCK),
    ]
    for stage in range(num_stages):
        ours = rf"backbone.stages.{stage}"
        renames += [
            (rf"{prefix}norm{stage + 1}\.(\w+)", rf"{ours}.norm.\1"),
            (rf"{prefix}ctm{stage}\.conv\.(weight|bias)", rf"{ours}.ctm.conv.\1"),
            (rf"{prefix}ctm{stage}\.conv\.skip\.weight", rf"{ours}.ctm.skip.weight"),
            (rf"{prefix}ctm{stage}\.(norm|score)\.(\w+)", rf"{ours}.ctm.\1.\2"),
            *((rf"{prefix}block{stage + 1}\.(\d+)\.{name}", rf"{ours}.blocks.\1.{new}") for name, new in _TOKEN_BLOCK),
        ]
    return renames


def flatten_skips(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn TCFormer's pointwise skips into what ours are.

    Args:
        state: official names → tensors.
    Returns: the same with (O, I, 1) as (O, I) in merges, and (O, 1, 1) as (O,) in MLPs.
    """
    return {
        name: (tensor.flatten() if ".mlp." in name else tensor.squeeze(-1)) if name.endswith("skip.weight") else tensor
        for name, tensor in state.items()
    }


def load_tcformer(model: nn.Module, state: Mapping[str, Tensor], *, num_stages: int = 4) -> None:
    """Load an official TCFormer: classifier, or pose model with its neck.

    Args:
        model: one of `tcformer`'s; takes the weights in place.
        state: official names → tensors.
        num_stages: of the model.
    Raises: ValueError as `load_official`.
    """
    load_official(model, flatten_skips(state), tcformer_renames(num_stages=num_stages))


_MIXER: Renames = (
    (r"0\.fn\.0\.(\w+)", "conv"),
    (r"0\.fn\.2\.(\w+)", "norm1"),
    (r"1\.(\w+)", "point"),
    (r"3\.(\w+)", "norm2"),
)


def paca_teacher_renames(*, num_stages: int) -> Renames:
    """Names of the official classifiers with a teacher → names of `PaCaTeacherViTClassifier`.

    Args:
        num_stages: the official names count stages from 1.
    """
    renames: list[tuple[str, str]] = []
    for stage in range(num_stages):
        official, ours = stage + 1, stage
        for name, new in _MIXER:
            renames += [
                (rf"paca_teacher\.block{official}\.(\d+)\.{name}", rf"teacher.blocks.{ours}.\1.{new}.\2"),
                (rf"paca_teacher\.fpn{official}\.{name}", rf"teacher.fuses.{ours}.{new}.\1"),
            ]
        renames += [
            (rf"paca_teacher\.transition{official}\.0\.blur_filter", rf"teacher.transitions.{ours}.blur"),
            (rf"paca_teacher\.transition{official}\.0\.conv\.(\w+)", rf"teacher.transitions.{ours}.conv.\1"),
            (rf"paca_teacher\.transition{official}\.2\.(\w+)", rf"teacher.transitions.{ours}.norm.\1"),
            (rf"paca_teacher\.lateral{official}\.0\.(\w+)", rf"teacher.laterals.{ours}.conv.\1"),
            (rf"paca_teacher\.lateral{official}\.2\.(\w+)", rf"teacher.laterals.{ours}.norm.\1"),
            (rf"paca_teacher\.to_clusters{official}\.(\w+)", rf"teacher.to_clusters.{ours}.\1"),
        ]
    # With a teacher no block holds a clustering, so its kind says nothing.
    return [*renames, *paca_vit_renames("conv", num_stages=num_stages)]


def paca_seg_renames(clustering: str, *, num_stages: int) -> Renames:
    """Names of the official models with the PaCa segmentation head → names of `PaCaSegmenter`.

    Args:
        clustering: "conv" or "mlp", as in `PaCaViTConfig`.
        num_stages: the official names count stages from 1.
    """
    conv_norm = {"q": r"q\.0", "cluster_hidden": r"clustering\.0", "proj": "proj"}
    return [
        *((rf"backbone\.{name}", ours) for name, ours in paca_vit_renames(clustering, num_stages=num_stages)),
        (r"decode_head\.convs\.(\d+)\.conv\.(\w+)", r"head.laterals.\1.conv.\2"),
        (r"decode_head\.convs\.(\d+)\.bn\.(\w+)", r"head.laterals.\1.norm.\2"),
        *((rf"decode_head\.{name}\.conv\.(\w+)", rf"head.{ours}.conv.\1") for ours, name in conv_norm.items()),
        *((rf"decode_head\.{name}\.bn\.(\w+)", rf"head.{ours}.norm.\1") for ours, name in conv_norm.items()),
        (r"decode_head\.clustering\.1\.(\w+)", r"head.cluster_scores.\1"),
        (r"decode_head\.(k|v)\.0\.(\w+)", r"head.\1.fc.\2"),
        (r"decode_head\.(k|v)\.2\.(\w+)", r"head.\1.norm.\2"),
        (r"decode_head\.conv_seg\.(\w+)", r"head.classifier.\1"),
    ]


WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")  # the last two hold averages over the training


def official_state(checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """Unpack the tensors of an official checkpoint.

    Args:
        checkpoint: as loaded: the state dict itself, or a mapping that holds it under one of `WRAPPERS`, of which the
            first counts. Names may begin with `module.`, which training on several devices puts there.
    Raises: ValueError if what should be the state dict holds something else than tensors.
    """
    wrapped = next((checkpoint[wrapper] for wrapper in WRAPPERS if wrapper in checkpoint), checkpoint)
    if not isinstance(wrapped, Mapping):
        raise ValueError(f"checkpoint holds a {type(wrapped).__name__} as its weights, expected names and tensors")
    state: dict[str, Tensor] = {}
    for name, tensor in wrapped.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"checkpoint holds a {type(tensor).__name__} under {name}, expected a tensor")
        state[str(name).removeprefix("module.")] = tensor
    return state
