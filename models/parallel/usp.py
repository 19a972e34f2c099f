"""USP: exact attention over a sequence that is spread over ranks, by Ulysses, by ring, or by both.

Heads are first exchanged for tokens among ulysses ranks (`models.parallel.ulysses`), then keys and values go round the
ring (`models.parallel.ring`). Every rank calls `SequenceParallel.attend` with its own tokens and gets their outputs.

Source: Fang and Zhao 2024, "USP: A Unified Sequence Parallelism Approach for Long Context Generative AI", algorithm 1;
official code github.com/feifeibear/long-context-attention @56118e0.
Differs: groups are arguments (official: a process-wide singleton); heads of keys are repeated where there are fewer
than ulysses ranks, lengths need not divide, keys may be masked, and every layout works without a causal mask (official:
dies or refuses).
Deliberately absent: dropout, windows, other lengths of keys than of queries.
"""

from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

from models.parallel.collectives import Communicator, check_agreement
from models.parallel.layout import LAYOUTS, Layout, padded_length, ring_positions, shard_positions
from models.parallel.ring import ring_backward, ring_forward
from models.parallel.tiles import Answer, Heads, Sight
from models.parallel.ulysses import gather_heads, scatter_heads

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sequence_mesh(*, ulysses: int, ring: int, device_type: str = "cpu") -> DeviceMesh:
    """Arrange all ranks as data · ring · ulysses; ulysses ranks are neighbours, who share the fastest link.

    Args:
        ulysses, ring: degrees; what is left of the ranks is for different data.
        device_type: "cpu" or "cuda".
    Returns: a mesh with the dimensions "data", "ring" and "ulysses".
    Raises: ValueError if the degrees do not divide the number of ranks.
    """
    num_ranks = dist.get_world_size()
    if ulysses < 1 or ring < 1 or num_ranks % (ulysses * ring):
        raise ValueError(
            f"ulysses={ulysses} times ring={ring} must divide the {num_ranks} ranks; choose other degrees or ranks"
        )
    sizes = (num_ranks // (ulysses * ring), ring, ulysses)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("data", "ring", "ulysses"))


class SequenceParallel:
    """One rank's part in attention over a sequence that is spread over ulysses · ring ranks.

    Args:
        ulysses, ring: groups of this rank, such as `mesh.get_group("ulysses")` of a `sequence_mesh`; a group of one,
            or None, switches its half off.
        layout: which tokens a rank holds, see `models.parallel.layout`.
        num_segments: see `models.parallel.layout.padded_length`.
        timeout_seconds: longest wait for a message, after which a rank counts as lost; see `Communicator`.

    Attributes:
        ulysses, ring: the same groups with their messages.
        rank: ring rank · ulysses degree + ulysses rank.
        num_ranks: G.
    Raises: ValueError for an unknown layout or a timeout that is not positive.
    """

    def __init__(
        self,
        ulysses: dist.ProcessGroup | None,
        ring: dist.ProcessGroup | None,
        layout: Layout = "basic",
        *,
        num_segments: int = 1,
        timeout_seconds: float = 60.0,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout} must be one of {', '.join(LAYOUTS)}")
        self.ulysses = Communicator(ulysses, timeout_seconds=timeout_seconds)
        self.ring = Communicator(ring, timeout_seconds=timeout_seconds)
        self.layout = layout
        self.num_segments = num_segments
        self.rank = self.ring.rank * self.ulysses.size + self.ulysses.rank
        self.num_ranks = self.ring.size * self.ulysses.size

    @property
    def bytes_sent(self) -> int:
        """Payload that left this rank so far."""
        return self.ulysses.bytes_sent + self.ring.bytes_sent

    def positions(self, length: int) -> Tensor:
        """Tokens of a sequence that this rank holds, in its order: (N,) int64, N = 0 where ranks outnumber tokens."""
        positions = shard_positions(length, self.layout, **self._grid())[self.rank]
        return positions[positions < length]

    def shard(self, x: Tensor, *, dim: int) -> Tensor:
        """Take this rank's tokens of the whole sequence."""
        return x.index_select(dim, self.positions(x.shape[dim]).to(x.device))

    def gather(self, x: Tensor, *, dim: int, length: int) -> Tensor:
        """Bring the tokens of all ranks together: the inverse of `shard`, on every rank; carries no gradient."""
        positions = shard_positions(length, self.layout, **self._grid())
        x = _pad(x.detach().movedim(dim, 0), positions.shape[1], dim=0)
        everyone = self.ring.gather(self.ulysses.gather(x).wait()).wait().flatten(0, 2)  # (G · slots, …)
        order = positions.flatten().argsort()[:length]
        return everyone[order.to(x.device)].movedim(0, dim)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        length: int,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Attend from this rank's tokens to the tokens of all ranks; every rank has to call it.

        Args:
            q: (B, H, N, D), N = len(self.positions(length)).
            k: (B, J, N, D), J a divisor of H: query head h attends with key head h · J // H.
            v: (B, J, N, E).
            length: tokens of the whole sequence.
            key_mask: (B, N) bool, True = real token; on all ranks or on none. A query that sees no key gets zeros.
            is_causal: whether a query sees no key of a later position.
            scale: of the dot products; None is 1/√D.
        Returns: (B, H, N, E), dtype of q.
        Raises: ValueError if shapes, types or heads do not fit, before any message; if ranks disagree on them, on all
            ranks and before any tensor is sent; RankLost if a rank is lost or late.
        """
        self._check(q, k, v, length, key_mask)
        has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        self._check_agreement(q, k, v, length, [key_mask is not None, is_causal, has_gradient])
        num_slots = padded_length(length, self.layout, **self._grid()) // self.num_ranks
        if key_mask is not None:
            k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
        call = _Call(
            self.ulysses,
            self.ring,
            self._sights(length, num_slots, key_mask, q.device, is_causal=is_causal),
            lcm(k.shape[1], self.ulysses.size) // k.shape[1],
            q.shape[3] ** -0.5 if scale is None else scale,
        )
        slots = [_pad(x, num_slots, dim=2) for x in (q, k, v)]
        out: Tensor = _Attention.apply(*slots, call)  # type: ignore[no-untyped-call]
        return out[:, :, : q.shape[2]]

    def _sights(
        self, length: int, num_slots: int, key_mask: Tensor | None, device: torch.device, *, is_causal: bool
    ) -> list[Sight]:
        """For the keys of each ring rank, which of them this ring rank's queries see."""
        positions = ring_positions(length, self.layout, **self._grid())  # (ring, S)
        masks: list[Tensor | None] = [None] * self.ring.size
        if key_mask is not None:
            slots = _pad(key_mask, num_slots, dim=1)  # (B, slots)
            row = self.ulysses.gather(slots).wait().transpose(0, 1).flatten(1)  # (B, S)
            masks = list(self.ring.gather(row).wait())
        elif positions.numel() > length:
            masks = list((positions < length)[:, None].to(device))  # (ring, 1, S): for every sample
        own = positions[self.ring.rank]
        return [Sight(own, keys, is_causal, mask) for keys, mask in zip(positions, masks, strict=True)]

    def _grid(self) -> dict[str, int]:
        return {"ulysses": self.ulysses.size, "ring": self.ring.size, "num_segments": self.num_segments}

    def _check(self, q: Tensor, k: Tensor, v: Tensor, length: int, key_mask: Tensor | None) -> None:
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        if not q.dim() == k.dim() == v.dim() == 4 or q.shape[3] != k.shape[3] or k.shape[1] != v.shape[1]:
            raise ValueError(f"{shapes} must be (B, H, N, D), (B, J, N, D) and (B, J, N, E)")
        N = len(self.positions(length))
        if not q.shape[0] == k.shape[0] == v.shape[0] > 0 or not q.shape[2] == k.shape[2] == v.shape[2] == N:
            raise ValueError(
                f"{shapes} must hold one batch and the {N} tokens that rank {self.rank} of {self.num_ranks} has of "
                f"{length} in layout {self.layout}; cut them with `shard`"
            )
        if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] % self.ulysses.size:
            raise ValueError(
                f"{q.shape[1]} heads of queries must be a multiple of {k.shape[1]} heads of keys and of "
                f"ulysses={self.ulysses.size}; choose a smaller ulysses degree and a larger ring"
            )
        if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES or not q.device == k.device == v.device:
            raise ValueError(f"q, k and v must share one float type and device; got {q.dtype}, {k.dtype}, {v.dtype}")
        if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (q.shape[0], N)):
            raise ValueError(
                f"key_mask {tuple(key_mask.shape)} {key_mask.dtype} must be {(q.shape[0], N)} torch.bool, this rank's"
            )

    def _check_agreement(self, q: Tensor, k: Tensor, v: Tensor, length: int, choices: list[bool]) -> None:
        B, H, _, D = q.shape
        facts = {"batch": B, "heads": H, "key_heads": k.shape[1], "head_dim": D, "value_dim": v.shape[3]}
        facts |= {"length": length, "dtype": DTYPES.index(q.dtype), "layout": LAYOUTS.index(self.layout)}
        facts |= {"num_segments": self.num_segments}
        facts |= dict(zip(("has_key_mask", "is_causal", "has_gradient"), map(int, choices), strict=True))
        check_agreement(facts, (self.ulysses, self.ring), device=q.device)


@dataclass(frozen=True)
class _Call:
    """What one call of attention needs besides its tensors.

    Attributes:
        ulysses, ring: see `SequenceParallel`.
        sights: for the keys of each ring rank.
        num_copies: of each head of keys, so that every ulysses rank gets one.
        scale: of the dot products.
    """

    ulysses: Communicator
    ring: Communicator
    sights: list[Sight]
    num_copies: int
    scale: float


class _Attention(torch.autograd.Function):
    """Exchange, ring, exchange; one function, so that backward sends the same messages on every rank, in one order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        k, v = (x[:, :, None].expand(-1, -1, call.num_copies, -1, -1).flatten(1, 2) for x in (k, v))
        posted = [scatter_heads(x, call.ulysses) for x in (q, k, v)]
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (wait() for wait in posted)  # (B, heads, S, D)
            heads = Heads(q.unflatten(1, (k.shape[1], -1)), k, v)
            answer = ring_forward(heads, call.sights, call.ring, scale=call.scale)
        ctx.save_for_backward(*heads, *answer)
        ctx.call = call
        return gather_heads(answer.out.flatten(1, 2).to(q.dtype), call.ulysses)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        call: _Call = ctx.call
        heads, answer = Heads(*ctx.saved_tensors[:3]), Answer(*ctx.saved_tensors[3:])
        arrived = scatter_heads(d_out, call.ulysses)()
        with torch.autocast(d_out.device.type, enabled=False):
            d_answer = arrived.to(answer.out.dtype).unflatten(1, heads.q.shape[1:3])
            d_q, d_k, d_v = ring_backward(heads, call.sights, answer, d_answer, call.ring, scale=call.scale)
        posted = [gather_heads(d_q.flatten(1, 2).to(d_out.dtype), call.ulysses)]
        # Copies are added up in float32; a single one is sent as it will be used.
        dtype = d_out.dtype if call.num_copies == 1 else d_k.dtype
        posted += [gather_heads(x.to(dtype), call.ulysses) for x in (d_k, d_v)]
        d_q, d_k, d_v = (wait() for wait in posted)
        d_k, d_v = (x.unflatten(1, (-1, call.num_copies)).sum(dim=2).to(d_out.dtype) for x in (d_k, d_v))
        return d_q, d_k, d_v, None


def _pad(x: Tensor, num_slots: int, *, dim: int) -> Tensor:
    """Append zeros along a dimension until it has so many slots."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, num_slots - x.shape[dim]))
