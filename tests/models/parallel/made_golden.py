"""Writes golden files of our own making, in the schema of the golden README: sizes that no stored file has.

What is expected in them comes from float64 on one process.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.attention_by_clusters import clustered_attention, improved_clustered_attention
from models.parallel.layout import Layout, shard_positions
from tests.models.parallel.laws import draw, reference

NAMES = ("q", "k", "v", "dout")


def draw_heads(num_heads: int, num_key_heads: int, length: int, *, batch: int = 2, dim: int = 8) -> list[Tensor]:
    """q, k, v and the gradient of the output: (B, H, L, D)."""
    heads = (num_heads, num_key_heads, num_key_heads, num_heads)
    return [draw(batch, h, length, dim, seed=40 + i) for i, h in enumerate(heads)]


def write_shards(path: Path, *, ulysses: int, ring: int, layout: Layout, num_heads: int, num_key_heads: int) -> None:
    """Each rank's tensors, with a causal mask."""
    num_ranks = ulysses * ring
    length = 4 * num_ranks
    heads = draw_heads(num_heads, num_key_heads, length)
    expected = reference(heads, None, is_causal=True)
    meta = {"L": length, "u": ulysses, "r": ring, "layout": layout, "causal": True, "P": num_ranks}
    stored: dict[str, Tensor] = {}
    for rank, positions in enumerate(shard_positions(length, layout, ulysses=ulysses, ring=ring)):
        stored[f"rank{rank}.pos"] = positions
        for name, x in (dict(zip(NAMES, heads, strict=True)) | expected).items():
            stored[f"rank{rank}.{name}"] = x[:, :, positions].transpose(1, 2)
    save(path, stored, meta)


def write_whole(
    path: Path, *, num_heads: int, num_key_heads: int, length: int, lengths: list[int] | None, has_gradients: bool
) -> None:
    """The whole sequence; `lengths` are those of a batch, with what lies beyond them drawn too."""
    heads = draw_heads(num_heads, num_key_heads, length, batch=len(lengths or [0, 0]))
    mask = None
    stored = {}
    if lengths is not None:
        stored["kv_len"] = torch.tensor(lengths)
        mask = torch.arange(length) < stored["kv_len"][:, None]
        heads[3] = heads[3] * mask[:, None, :, None]
    kept = 4 if has_gradients else 3
    stored |= {name: x.transpose(1, 2) for name, x in zip(NAMES[:kept], heads, strict=False)}
    for kind in ("full", "causal"):
        expected = reference(heads, mask, is_causal=kind == "causal")
        for name in ("out", "dq", "dk", "dv")[:kept]:
            if has_gradients or name == "out":
                stored[f"{kind}.{name}"] = expected[name].transpose(1, 2)
    save(path, stored, {"L": length, "H": num_heads, "Hkv": num_key_heads})


def write_clustered(
    path: Path, *, num_ranks: int, length: int, num_clusters: int, top_k: int, is_segment_local: bool
) -> None:
    """Clustered and improved attention; the gradients of the latter are left out."""
    q, k, v, d_out = draw_heads(4, 4, length, batch=1)
    rows = -(-length // num_ranks)
    clusters = torch.randint(num_clusters, (1, 4, length), generator=torch.Generator().manual_seed(8))
    if is_segment_local:
        per_rank = num_clusters // num_ranks
        clusters = clusters % per_rank + (torch.arange(length) // rows) * per_rank
    lengths, wide = torch.tensor([length]), [x.double().requires_grad_() for x in (q, k, v)]
    out = clustered_attention(*wide, clusters, lengths, num_clusters=num_clusters)
    gradients = torch.autograd.grad(out, wide, d_out.double())
    improved = improved_clustered_attention(*wide, clusters, lengths, num_clusters=num_clusters, top_k=top_k)
    stored = dict(zip(NAMES, (q, k, v, d_out), strict=True)) | {"assign": clusters[..., None], "improved.out": improved}
    names = ("out", "dq", "dk", "dv")
    stored |= {f"clustered.{n}": x for n, x in zip(names, (out, *gradients), strict=True)}
    stored = {name: x[0].transpose(0, 1) for name, x in stored.items()}  # (N, H, D)
    stored["assign"] = stored["assign"].squeeze(-1)
    meta = {"N": length, "C": num_clusters, "topk": top_k, "P": num_ranks, "segment_local": is_segment_local}
    save(path, stored, meta)


def save(path: Path, stored: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Whole numbers as they are, others in float32."""
    arrays = {n: (x.detach().float() if x.is_floating_point() else x).numpy() for n, x in stored.items()}
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)
