"""A small CTC transformer with random weights and the facts of its run."""

from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from export.source import Source
from models.clustered_attention import ClusteredAttentionConfig
from models.ctc_transformer import CtcTransformer, CtcTransformerConfig
from tests.service.tiny_bundle import make_facts

CLUSTERED, FULL = "ctc-transformer-of-tests", "ctc-transformer-full-of-tests"
FULL_BELOW = 200  # tokens, 4 s: the sample recording is shorter
CONFIG = CtcTransformerConfig(
    num_layers=2,
    dim=32,
    num_heads=2,
    hidden_dim=64,
    num_mels=20,
    stem_channels=4,
    kernel_size=5,
    attention=ClusteredAttentionConfig(num_clusters=8, top_k=8, bits=16, iterations=2, full_below=FULL_BELOW),
)
RECOGNISERS = {
    CLUSTERED: partial(CtcTransformer, CONFIG),
    FULL: partial(CtcTransformer, replace(CONFIG, attention=None)),
}
LABELS = ["", " ", *"ABC"]


def make_recogniser(architecture: str) -> CtcTransformer:
    """A model whose weights fit into float16, as training leaves them; every layer changes much."""
    torch.manual_seed(0)
    model = RECOGNISERS[architecture](num_classes=len(LABELS))
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            scale = 3.0 if name.endswith("weight") and weight.ndim > 1 else 1.0
            weight.copy_((scale * weight).half())
    return model.eval()


def make_speech_source(architecture: str, **spec: Any) -> Source:
    facts = make_facts() | {"name": architecture, "task": "speech-recognition", "default": False}
    facts["normalisation"] = {"mean": [-6.1], "std": [3.7]}
    facts["origin"] = facts["origin"].model_copy(update={"architecture": architecture})
    facts["created"] = datetime(2026, 3, 4, tzinfo=UTC)
    facts["spec"] = {
        "sample_rate_hz": 16_000,
        "min_seconds": 0.1,
        "max_seconds": 120.0,
        "features": {"num_mels": CONFIG.num_mels},
        "labels": LABELS,
        "subsampling": 2,
        "beam_width": 1,
    } | spec
    return Source.model_validate({name: facts[name] for name in Source.model_fields})
