"""Configurations whose checkpoints others published: which model they fill, by which names, from which pictures.

Source: the official repositories, at the commits that stand below. Their preprocessing of pictures for ImageNet: the
shorter side to 224 pixels over the crop share (0.875 for TCFormer, `classification/datasets.py`; 0.9 for PaCa-ViT,
`_cfg` of its model), bicubic, middle 224 x 224. Segmentation models saw crops of 512 x 512. THC takes Fisher's z of
correlations, 0 on the diagonal; its authors published code and no weights, so that only one's own can be converted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.checkpoints import THC, Renames, drop_encoder_aliases, paca_vit_renames, split_in_projections
from models.checkpoints_tcformer import flatten_skips, paca_seg_renames, paca_teacher_renames, tcformer_renames
from service.bundle import Normalisation

PACA = "github.com/iVMCL/PaCaViT @4307018"
TCFORMER = "github.com/zengwang430521/TCFormer @1ea72a8"
THC_CODE = "github.com/DDVD233/THC @9af3a57"
NUM_STAGES = 4  # of all of them
MAX_PIXELS = 50_000_000
IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # of ImageNet-1k, torchvision's
AS_IT_IS = Normalisation(mean=(0.0,), std=(1.0,))
FILL = [round(255 * mean) for mean in IMAGENET.mean]

Prepare = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What weights were trained on.

    Attributes:
        name: as it stands in a bundle's name.
        title: for people.
        license: what its authors ask for.
        num_classes: L.
    """

    name: str
    title: str
    license: str
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What is known of a published configuration before its checkpoint is opened.

    Attributes:
        official: what its publishers call it.
        publisher: their repository, and the commit that names and preprocessing were read from.
        architecture: name and paper, for people.
        code_license: of the official code; it need not be that of the weights.
        task: that it is served for.
        data: what it was trained on.
        renames: official names → ours.
        prepare: what the official tensors need before.
        class_bias: official name of a tensor that has one number for each class.
        max_batch: samples that may run together. A service tries batches up to it when it first starts, several times
            each, and these models take tenths of a second to seconds for one picture on a core.
        spec: what the task wants to know, without labels.
        normalisation: that the program does.
    """

    official: str
    publisher: str
    architecture: str
    code_license: str
    task: str
    data: DataSet
    renames: Renames
    prepare: Prepare = dict
    class_bias: str = "head.bias"
    max_batch: int = 8
    spec: Mapping[str, Any]
    normalisation: Normalisation = IMAGENET


IMAGENET_1K = DataSet(
    name="imagenet1k",
    title="ImageNet-1k, as its publishers say",
    license="see the terms of access at image-net.org/download; for non-commercial research and education",
    num_classes=1000,
)
ADE20K = DataSet(
    name="ade20k",
    title="ADE20K (150 classes), as its publishers say; backbone pretrained on ImageNet-1k",
    license="see the terms at groups.csail.mit.edu/vision/datasets/ADE20K/terms; for non-commercial research and "
    "education",
    num_classes=150,
)
ABIDE = DataSet(
    name="abide",
    title="not known here; ABIDE, where the official code was used as it is",
    license="not known here; of ABIDE see fcon_1000.projects.nitrc.org/indi/abide, for non-commercial research",
    num_classes=2,
)


def _middle(resize_shorter_side: int) -> dict[str, Any]:
    size = {"height": 224, "width": 224, "resize_shorter_side": resize_shorter_side}
    return size | {"interpolation": "bicubic", "max_pixels": MAX_PIXELS}


def _paca_classifier(official: str, renames: Renames) -> Publication:
    return Publication(
        official=official,
        publisher=PACA,
        architecture="PaCa-ViT (Grainger et al. 2023)",
        code_license="MIT by the header of its files",
        task="image-classification",
        data=IMAGENET_1K,
        renames=renames,
        spec=_middle(248),
    )


def _paca_vit(official: str, clustering: str = "conv") -> Publication:
    return _paca_classifier(official, paca_vit_renames(clustering, num_stages=NUM_STAGES))


def _paca_teacher(official: str) -> Publication:
    return _paca_classifier(official, paca_teacher_renames(num_stages=NUM_STAGES))


def _paca_seg(official: str) -> Publication:
    return Publication(
        official=official,
        publisher=PACA,
        architecture="PaCa-ViT with the PaCa segmentation head (Grainger et al. 2023)",
        code_license="MIT by the header of its files",
        task="image-segmentation",
        data=ADE20K,
        renames=paca_seg_renames("conv", num_stages=NUM_STAGES),
        class_bias="decode_head.conv_seg.bias",
        max_batch=4,
        spec={"height": 512, "width": 512, "fill": FILL, "max_pixels": MAX_PIXELS},
    )


def _tcformer(official: str) -> Publication:
    return Publication(
        official=official,
        publisher=TCFORMER,
        architecture="TCFormer (Zeng et al. 2022)",
        code_license="Apache-2.0",
        task="image-classification",
        data=IMAGENET_1K,
        renames=tcformer_renames(num_stages=NUM_STAGES),
        prepare=flatten_skips,
        spec=_middle(256),
    )


def _name_encoders_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return drop_encoder_aliases(split_in_projections(state))


_THC = Publication(
    official="thc",
    publisher=THC_CODE,
    architecture="THC (Dai et al. 2023), each subject's communities from that subject alone, where officially they "
    "depend on the batch",
    code_license="of a licence not known here",
    task="brain-network-classification",
    data=ABIDE,
    renames=THC,
    prepare=_name_encoders_once,
    class_bias="readout_list.0.fc.4.bias",
    max_batch=32,
    spec={
        "atlas": "CC200",
        "regions": [f"region_{index}" for index in range(1, 201)],
        "matrix": "fisher_z",
        "min_frames": 100,  # the official data have no shorter ones
        "num_communities": [90, 4],
    },
    normalisation=AS_IT_IS,
)

# Name among the builders → what its checkpoint is.
PUBLISHED: dict[str, Publication] = {
    "paca-vit-tiny": _paca_vit("pacavit_tiny_p2cconv_100_0"),
    "paca-vit-small": _paca_vit("pacavit_small_p2cconv_100_0"),
    "paca-vit-small-mlp": _paca_vit("pacavit_small_p2cmlp_100_0", "mlp"),
    "paca-vit-small-blockwise": _paca_vit("pacavit_small_p2cconv_100_blockwise"),
    "paca-vit-small-100-100": _paca_vit("pacavit_small_p2cconv_100"),
    "paca-vit-small-100-49": _paca_vit("pacavit_small_p2cconv_100_49"),
    "paca-vit-small-49-100": _paca_vit("pacavit_small_p2cconv_49_100"),
    "paca-vit-small-49-0": _paca_vit("pacavit_small_p2cconv_49_0"),
    "paca-vit-small-2-0": _paca_vit("pacavit_small_p2cconv_2_0"),
    "paca-vit-base": _paca_vit("pacavit_base_p2cconv_100_0"),
    "paca-teacher-tiny": _paca_teacher("pacavit_convmixer_tiny_100"),
    "paca-teacher-small": _paca_teacher("pacavit_convmixer_small_100"),
    "paca-teacher-base": _paca_teacher("pacavit_convmixer_base_100"),
    "paca-seg-tiny": _paca_seg("pacahead_pacavit_tiny_p2cconv_100_0_ade20k"),
    "paca-seg-small": _paca_seg("pacahead_pacavit_small_p2cconv_100_0_ade20k"),
    "paca-seg-base": _paca_seg("pacahead_pacavit_base_p2cconv_100_0_ade20k"),
    "tcformer-light": _tcformer("tcformer_light"),
    "tcformer-base": _tcformer("tcformer"),
    "tcformer-large": _tcformer("tcformer_large"),
    "thc-cc200-flat": _THC,
}

# What publishers call it → the task that a service would need for it.
UNSERVED = {
    "tcformer_pose_mta_wholebody": "keypoint estimation",
    "tcformer_large_pose_mta_wholebody": "keypoint estimation",
}
# How names of a checkpoint begin that belong to such a task.
UNSERVED_PARTS = {"keypoint_head.": "keypoint estimation", "rpn_head.": "object detection"}


def find_publication(name: str) -> tuple[str, Publication]:
    """Find a published configuration.

    Args:
        name: among the builders, or what its publishers call it.
    Returns: its name among the builders, and what is known of it.
    Raises: ValueError if there is none, or none that can be served.
    """
    if name in UNSERVED:
        raise ValueError(
            f"{name} needs a task for {UNSERVED[name]}, which this service does not have; one of "
            f"{', '.join(PUBLISHED)} can be converted"
        )
    for builder, publication in PUBLISHED.items():
        if name in (builder, publication.official):
            return builder, publication
    raise ValueError(
        f"{name} is no configuration of a published whole model; one of {', '.join(PUBLISHED)} is; models of ours are "
        "trained with `python -m training`, and an encoder alone lacks the layers of a task"
    )
