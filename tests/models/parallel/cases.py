"""What tests run on each rank. Every function takes the rank first and gives plain numbers."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.parallel.cluster_plan import ClusterPlan
from models.parallel.clustered import clustered_attention
from models.parallel.collectives import Communicator
from models.parallel.improved import improved_clustered_attention
from models.parallel.layout import LAYOUTS, Layout, ring_positions
from models.parallel.ring import ring_forward
from models.parallel.tiles import Heads, Sight
from models.parallel.usp import SequenceParallel, sequence_mesh

Errors = dict[str, float]


@cache
def axes(ulysses: int, ring: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    mesh = sequence_mesh(ulysses=ulysses, ring=ring)
    return mesh.get_group("ulysses"), mesh.get_group("ring")


def parallel(ulysses: int, ring: int, layout: Layout) -> SequenceParallel:
    return SequenceParallel(*axes(ulysses, ring), layout, timeout_seconds=30.0)


@cache
def everyone() -> Communicator:
    return Communicator(axes(dist.get_world_size(), 1)[0], timeout_seconds=30.0)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected number, of 1 at least."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not expected.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def worst(into: Errors, name: str, value: float) -> None:
    into[name] = max(into.get(name, 0.0), math.inf if math.isnan(value) else value)


def read_golden(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with np.load(path) as file:
        meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
        return meta, {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}


def heads_first(stored: dict[str, Tensor], prefix: str, *names: str) -> list[Tensor]:
    """Tensors (B, L, H, D) of the file as (B, H, N, D)."""
    return [stored[prefix + name].transpose(1, 2) for name in names]


def attend(sp: SequenceParallel, heads: list[Tensor], **settings: Any) -> dict[str, Tensor]:
    """Attend to one rank's q, k and v; where the output's gradient comes as a fourth, theirs are found too."""
    q, k, v = (x.detach().clone().requires_grad_() for x in heads[:3])
    out = sp.attend(q, k, v, **settings)
    if len(heads) == 3:
        return {"out": out}
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), heads[3]), strict=True)) | {"out": out}


def names_in(stored: dict[str, Tensor], prefix: str, *names: str) -> list[str]:
    """Those of the names that a file has; outputs are never missing, gradients may be."""
    return [name for name in names if prefix + name in stored]


def golden_shards(rank: int, path: Path) -> Errors:
    meta, stored = read_golden(path)
    own = f"rank{rank}."
    sp = parallel(meta["u"], meta["r"], meta["layout"])
    assert sp.positions(meta["L"]).equal(stored[f"{own}pos"].long())
    heads = heads_first(stored, own, *names_in(stored, own, "q", "k", "v", "dout"))
    names = names_in(stored, own, "out", "dq", "dk", "dv")
    assert "out" in names
    found = attend(sp, heads, length=meta["L"], is_causal=meta["causal"])
    return {name: error(found[name], *heads_first(stored, own, name)) for name in names}


def golden_whole(rank: int, path: Path) -> Errors:
    _, stored = read_golden(path)
    errors: Errors = {}
    num_ranks, (L, H) = dist.get_world_size(), stored["q"].shape[1:3]
    for ulysses in (u for u in range(1, num_ranks + 1) if num_ranks % u == 0 and H % u == 0):
        for layout in LAYOUTS:
            sp = parallel(ulysses, num_ranks // ulysses, layout)
            for kind in ("full", "causal"):
                if f"{kind}.out" in stored:
                    for name, value in compare_whole(sp, stored, kind, L).items():
                        worst(errors, f"{kind} {name}", value)
                if f"{kind}.lse" in stored and ulysses == 1:
                    worst(errors, f"{kind} lse", compare_lse(sp, stored, kind, L))
    return errors


def compare_whole(sp: SequenceParallel, stored: dict[str, Tensor], kind: str, length: int) -> Errors:
    inputs = names_in(stored, "", "q", "k", "v", "dout")
    heads = [sp.shard(x, dim=2) for x in heads_first(stored, "", *inputs)]
    names = names_in(stored, f"{kind}.", "out", "dq", "dk", "dv")
    wanted = {name: sp.shard(*heads_first(stored, f"{kind}.", name), dim=2) for name in names}
    settings: dict[str, Any] = {"length": length, "is_causal": kind == "causal"}
    if "kv_len" not in stored:
        found = attend(sp, heads, **settings)
    else:
        is_real = sp.positions(length) < stored["kv_len"][:, None]  # (B, N)
        found = attend(sp, heads, key_mask=is_real, **settings)
        # Rows beyond kv_len mean nothing in `out`; their share of the gradients is none, as `dout` is zero there.
        for tensors in (found, wanted):
            tensors["out"] = tensors["out"].masked_fill(~is_real[:, None, :, None], 0)
    return {name: error(found[name], want) for name, want in wanted.items()}


def compare_lse(sp: SequenceParallel, stored: dict[str, Tensor], kind: str, length: int) -> float:
    positions = ring_positions(length, sp.layout, ulysses=1, ring=sp.ring.size)
    lengths = stored["kv_len"][:, None] if "kv_len" in stored else torch.tensor([[length]])
    own = positions[sp.rank]
    sights = [Sight(own, keys, kind == "causal", keys < lengths) for keys in positions]
    q, k, v = (x[:, :, own.clamp(max=length - 1)] for x in heads_first(stored, "", "q", "k", "v"))
    heads = Heads(q.unflatten(1, (k.shape[1], -1)), k, v)
    lse = ring_forward(heads, sights, sp.ring, scale=q.shape[3] ** -0.5).lse.flatten(1, 2)  # (B, H, N)
    is_real = (own < lengths)[:, None].expand_as(lse)
    return error(lse[is_real], stored[f"{kind}.lse"][:, :, own.clamp(max=length - 1)][is_real])


def golden_clustered(rank: int, path: Path) -> Errors:
    meta, stored = read_golden(path)
    num_ranks = dist.get_world_size()
    has_segments = meta["segment_local"] and meta["C"] % num_ranks == 0
    plan = ClusterPlan(
        ranks=everyone(),
        length=meta["N"],
        num_clusters=meta["C"],
        num_segments=num_ranks if has_segments else 1,
    )
    rows = slice(plan.first_token, plan.first_token + plan.num_tokens)
    own = {name: x[rows].movedim(0, -1 if x.dim() == 2 else 1)[None] for name, x in stored.items()}  # (1, H, N, …)
    errors: Errors = {}
    # The file's gradients are those of the whole formula.
    improved = {"top_k": meta["topk"], "has_mass_gradient": True}
    runs: dict[str, dict[str, Any]] = {"clustered": {}, "improved": improved}
    runs |= {"improved, fetched": improved | {"max_fetch_ratio": 1e9}}
    runs |= {"improved, by heads": improved | {"max_fetch_ratio": -1.0}}
    for name, settings in runs.items():
        q, k, v = (own[x].clone().requires_grad_() for x in ("q", "k", "v"))
        kind = name.split(",")[0]
        attend = clustered_attention if kind == "clustered" else improved_clustered_attention
        out = attend(q, k, v, own["assign"].long(), plan, **settings)
        found = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), own["dout"]), strict=True))
        for x, value in (found | {"out": out}).items():
            if f"{kind}.{x}" in own:
                errors[f"{name} {x}"] = error(value, own[f"{kind}.{x}"])
    return errors
