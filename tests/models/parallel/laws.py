"""What the tests of laws run on each rank. Every function takes the rank first and gives plain numbers."""

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import ctc_loss

from models.attention_by_clusters import clustered_attention as clustered_alone
from models.attention_by_clusters import improved_clustered_attention as improved_alone
from models.clustered_attention import ClusteredAttentionConfig
from models.clustering import Metric, cluster_queries
from models.ctc_transformer import CtcTransformer, CtcTransformerConfig, count_tokens
from models.parallel.assignment import assign_clusters
from models.parallel.cluster_plan import ClusterPlan
from models.parallel.clustered import clustered_attention
from models.parallel.collectives import Communicator, RankLost
from models.parallel.halo import borrow_tokens
from models.parallel.improved import improved_clustered_attention
from models.parallel.layout import LAYOUTS, Layout
from models.parallel.speech import ParallelCtcTransformer, parallelize
from models.parallel.usp import SequenceParallel, sequence_mesh
from tests.models.parallel.cases import Errors, axes, error, everyone, parallel, worst

Settings = dict[str, Any]

# (heads, heads of keys, length, D, E), and whether keys are masked
KINDS: dict[str, tuple[tuple[int, int, int, int, int], bool]] = {
    "as many heads of keys": ((8, 8, 29, 8, 8), False),
    "two heads of keys, other width of values": ((8, 2, 29, 8, 6), False),
    "one head of keys": ((8, 1, 32, 4, 4), False),
    "heads of keys that the degrees do not divide": ((24, 3, 17, 4, 4), False),
    "fewer tokens than ranks": ((8, 8, 3, 8, 8), False),
    "masked keys, a half of them all, and a sample without any": ((8, 4, 30, 8, 8), True),
}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_heads(kind: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and the gradient of the output, and a mask of keys; what it hides holds no numbers."""
    (H, J, L, D, E), is_masked = KINDS[kind]
    heads = [draw(3, h, L, d, seed=s, dtype=dtype) for s, (h, d) in enumerate(((H, D), (J, D), (J, E), (H, E)))]
    if not is_masked:
        return heads, None
    mask = torch.rand(3, L, generator=torch.Generator().manual_seed(9)) < 0.7
    mask[0, L // 2 :] = False
    mask[1] = False
    for x in heads[1:3]:
        x[~mask[:, None].expand(-1, J, -1)] = math.nan
    return heads, mask


def reference(heads: list[Tensor], mask: Tensor | None, *, is_causal: bool) -> dict[str, Tensor]:
    """Attention and gradients in float64 on one process, from the definition."""
    q, k, v, d_out = (x.double().nan_to_num() for x in heads)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    J, (L, D) = q.shape[1] // k.shape[1], q.shape[2:]
    is_seen = torch.ones(L, L, dtype=torch.bool)
    is_seen = (is_seen.tril() if is_causal else is_seen)[None, None]
    if mask is not None:
        is_seen = is_seen & mask[:, None, None]
    scores = q @ k.repeat_interleave(J, dim=1).transpose(2, 3) / math.sqrt(D)
    weights = scores.masked_fill(~is_seen, -1e300).softmax(dim=-1) * is_seen
    out = weights @ v.repeat_interleave(J, dim=1)
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def attend(sp: SequenceParallel, heads: list[Tensor], mask: Tensor | None, *, is_causal: bool) -> dict[str, Tensor]:
    """The same on all ranks, brought together."""
    L = heads[0].shape[2]
    q, k, v, d_out = (sp.shard(x, dim=2) for x in heads)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    key_mask = None if mask is None else sp.shard(mask, dim=1)
    out = sp.attend(q, k, v, length=L, key_mask=key_mask, is_causal=is_causal)
    found = (out, *torch.autograd.grad(out, (q, k, v), d_out))
    return {n: sp.gather(x, dim=2, length=L) for n, x in zip(("out", "dq", "dk", "dv"), found, strict=True)}


def dense_errors(rank: int, dtype: torch.dtype = torch.float32) -> Errors:
    """Largest errors of all degrees, layouts in turn, all kinds of heads, causal and not."""
    num_ranks, errors = dist.get_world_size(), Errors()
    degrees = [u for u in range(1, num_ranks + 1) if num_ranks % u == 0]
    for i, kind in enumerate(KINDS):
        heads, mask = make_heads(kind, dtype)
        for is_causal in (False, True):
            expected = reference(heads, mask, is_causal=is_causal)
            for j, ulysses in enumerate(degrees):
                sp = parallel(ulysses, num_ranks // ulysses, LAYOUTS[(i + j) % 3])
                for name, found in attend(sp, heads, mask, is_causal=is_causal).items():
                    assert found.dtype == dtype
                    worst(errors, f"{kind}: {name}", error(found, expected[name]))
    return errors


def layout_errors(rank: int) -> Errors:
    """Errors of the gradients at every ring degree above 1 in each layout, causal and not."""
    heads, mask = make_heads("as many heads of keys")
    num_ranks, errors = dist.get_world_size(), Errors()
    for layout in LAYOUTS:
        for ring in (ring for ring in range(2, num_ranks + 1) if num_ranks % ring == 0):
            for is_causal in (False, True):
                found = attend(parallel(num_ranks // ring, ring, layout), heads, mask, is_causal=is_causal)
                expected = reference(heads, mask, is_causal=is_causal)
                for name in ("out", "dq", "dk", "dv"):
                    worst(errors, f"{layout} ring={ring}: {name}", error(found[name], expected[name]))
    return errors


def groups_of_other_data(rank: int) -> float:
    """Two sequences on two halves of the ranks, by Ulysses alone; each half has its own answer."""
    num_ranks = dist.get_world_size()
    sp = parallel(num_ranks // 2, 1, "basic")
    heads = [draw(1, 4, 12, 8, seed=10 * (rank // (num_ranks // 2)) + i) for i in range(4)]
    found = attend(sp, heads, None, is_causal=True)
    return max(error(found[name], want) for name, want in reference(heads, None, is_causal=True).items())


def changed_by_the_future(rank: int, ulysses: int, ring: int, layout: Layout) -> tuple[float, float]:
    """How much early and late outputs change when the last third of the keys does, with a causal mask."""
    sp = parallel(ulysses, ring, layout)
    heads, _ = make_heads("as many heads of keys")
    before = attend(sp, heads, None, is_causal=True)["out"]
    heads[1][:, :, 20:] += 1
    change = (attend(sp, heads, None, is_causal=True)["out"] - before).abs()
    return float(change[:, :, :20].max()), float(change[:, :, 20:].max())


def bytes_of_call(rank: int, ulysses: int, ring: int, layout: Layout, kind: str) -> dict[str, tuple[int, int]]:
    """Bytes counted and bytes written by the process, forward and backward."""
    (H, J, L, D, E), _ = KINDS[kind]
    sp = parallel(ulysses, ring, layout)
    n = len(sp.positions(L * 100))
    q, k, v = (draw(1, h, n, d, seed=0).requires_grad_() for h, d in ((H, D), (J, D), (J, E)))
    seen = {}
    before = sp.bytes_sent, written_bytes()
    out = sp.attend(q, k, v, length=L * 100)
    middle = sp.bytes_sent, written_bytes()
    out.sum().backward()
    after = sp.bytes_sent, written_bytes()
    seen["forward"] = middle[0] - before[0], middle[1] - before[1]
    seen["backward"] = after[0] - middle[0], after[1] - middle[1]
    return seen


def bytes_of_mask(rank: int) -> int:
    """What a mask of keys adds to the bytes of a call, forward and backward."""
    heads, mask = make_heads("masked keys, a half of them all, and a sample without any")
    sent = []
    for given in (None, mask):
        sp = parallel(2, 2, "basic")
        q, k, v = (sp.shard(x.nan_to_num(), dim=2).requires_grad_() for x in heads[:3])
        key_mask = None if given is None else sp.shard(given, dim=1)
        sp.attend(q, k, v, length=30, key_mask=key_mask).sum().backward()
        sent.append(sp.bytes_sent)
    return sent[1] - sent[0]


def written_bytes() -> int:
    """What this process has written to files and sockets since it started."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def disagree(rank: int, settings: Settings) -> str:
    """Odd ranks attend with other settings; gives the error's message."""
    q, options = draw(1, 4, 2, 8, seed=0), {"length": 8} | (settings if rank % 2 else {})
    batch = options.pop("batch", 1)
    if options.pop("has_mask", False):
        options["key_mask"] = torch.ones(1, 2, dtype=torch.bool)
    try:
        parallel(2, 2, "basic").attend(*[q.repeat(batch, 1, 1, 1)] * 3, **options)
    except ValueError as refusal:
        return str(refusal)
    return ""


def refused_heads(rank: int) -> tuple[str, int]:
    """The error's message, and the bytes sent before it."""
    sp = parallel(4, 1, "basic")
    try:
        sp.attend(*[draw(1, 6, 2, 8, seed=0)] * 3, length=8)
    except ValueError as refusal:
        return str(refusal), sp.bytes_sent
    return "", sp.bytes_sent


def refused_mesh(rank: int) -> str:
    try:
        sequence_mesh(ulysses=3, ring=1)
    except ValueError as refusal:
        return str(refusal)
    return ""


def places(rank: int, ulysses: int, ring: int) -> list[int]:
    """Coordinates: data, ring, ulysses."""
    coordinates = sequence_mesh(ulysses=ulysses, ring=ring).get_coordinate()
    assert coordinates is not None
    return list(coordinates)


def lose_a_rank(rank: int, how: str, what: str, timeout_seconds: float) -> tuple[str, float]:
    """The last rank dies between forward and backward, or comes late; gives each rank's error and its waiting time."""
    is_last = rank == dist.get_world_size() - 1
    sp = SequenceParallel(*axes(2, 2), "zigzag", timeout_seconds=timeout_seconds)
    plan = ClusterPlan(ranks=Communicator(axes(4, 1)[0], timeout_seconds=timeout_seconds), length=16, num_clusters=4)
    q, k, v = (draw(1, 4, 4, 8, seed=i).requires_grad_() for i in range(3))
    clusters = torch.zeros(1, 4, 4, dtype=torch.int64)
    dist.barrier()
    if is_last and how == "late":
        time.sleep(2 * timeout_seconds)
    started = time.perf_counter()
    try:
        out = sp.attend(q, k, v, length=16) if what == "dense" else clustered_attention(q, k, v, clusters, plan)
        if is_last and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.perf_counter()
        out.sum().backward()
    except RankLost as lost:
        return str(lost), time.perf_counter() - started
    return "", time.perf_counter() - started


# Clustered attention

CLUSTERED = {"batch": 2, "heads": 6, "length": 70, "dim": 8, "value_dim": 6}


def clustered_heads(seed: int = 0, length: int = 70) -> list[Tensor]:
    B, H, D, E = (CLUSTERED[name] for name in ("batch", "heads", "dim", "value_dim"))
    return [draw(B, H, length, d, seed=seed + i) for i, d in enumerate((D, D, E, E))]


def own_rows(x: Tensor, plan: ClusterPlan) -> Tensor:
    return x[:, :, plan.first_token : plan.first_token + plan.num_tokens]


def clustered_errors(rank: int, num_segments: int, num_clusters: int) -> Errors:
    """Largest errors of plain and improved clustered attention, beside one process with the same clusters."""
    lengths, errors = torch.tensor([70, 17]), Errors()
    heads = clustered_heads()
    plan = ClusterPlan(ranks=everyone(), length=70, num_clusters=num_clusters, num_segments=num_segments)
    planes = draw(31, 9, seed=7)
    settings: Settings = {"num_iterations": 3, "metric": "lsh"}
    clusters = assign_clusters(own_rows(heads[0], plan), planes, lengths, plan, **settings)
    whole = assign_clusters(heads[0], planes, lengths, alone(plan), **settings)
    assert clusters.equal(own_rows(whole, plan))
    runs: dict[str, Settings] = {"plain": {}, "improved": {"top_k": 5}}
    runs |= {f"improved, at most {r}": {"top_k": 5, "max_fetch_ratio": r} for r in (-1.0, 1e9)}
    runs |= {"improved, all keys": {"top_k": 70, "max_fetch_ratio": 1e9}}
    for name, options in runs.items():
        q, k, v = (own_rows(x, plan).clone().requires_grad_() for x in heads[:3])
        run = improved_clustered_attention if options else clustered_attention
        out = run(q, k, v, clusters, plan, key_lengths=lengths, **options)
        found = (out, *torch.autograd.grad(out, (q, k, v), own_rows(heads[3], plan)))
        wanted = clustered_reference(heads, whole, lengths, num_clusters, options.get("top_k", 0))
        for x, value, want in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            worst(errors, f"{name}: {x}", error(value, own_rows(want, plan)))
    return errors


def alone(plan: ClusterPlan) -> ClusterPlan:
    return ClusterPlan(
        ranks=Communicator(None), length=plan.length, num_clusters=plan.num_clusters, num_segments=plan.num_segments
    )


def clustered_reference(
    heads: list[Tensor], clusters: Tensor, lengths: Tensor, num_clusters: int, top_k: int
) -> list[Tensor]:
    """What one process gives in float64."""
    q, k, v = (x.double().requires_grad_() for x in heads[:3])
    if top_k:
        out = improved_alone(q, k, v, clusters, lengths, num_clusters=num_clusters, top_k=top_k)
    else:
        out = clustered_alone(q, k, v, clusters, lengths, num_clusters=num_clusters)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), heads[3].double())]


def is_assigned_alike(rank: int, metric: Metric, heads: int, length: int, num_clusters: int) -> bool:
    """Whether this rank's clusters are those that one process finds."""
    q, planes, lengths = draw(2, heads, length, 8, seed=3), draw(64, 9, seed=4), torch.tensor([length, length // 2])
    plan = ClusterPlan(ranks=everyone(), length=length, num_clusters=num_clusters)
    found = assign_clusters(own_rows(q, plan), planes, lengths, plan, num_iterations=4, metric=metric)
    whole = cluster_queries(q, planes, lengths, num_clusters=num_clusters, num_iterations=4, metric=metric)
    return found.equal(own_rows(whole, plan))


def clustered_traffic(rank: int, num_segments: int, length: int) -> dict[str, int]:
    """Bytes that this rank sends: assignment, plain clustered attention forward and backward."""
    ranks = everyone()
    plan = ClusterPlan(ranks=ranks, length=length, num_clusters=16, num_segments=num_segments)
    q, k, v = (own_rows(x, plan).clone().requires_grad_() for x in clustered_heads(length=length)[:3])
    marks = [ranks.bytes_sent]
    clusters = assign_clusters(q, draw(64, 9, seed=4), torch.tensor([length] * 2), plan, num_iterations=2, metric="lsh")
    marks.append(ranks.bytes_sent)
    out = clustered_attention(q, k, v, clusters, plan)
    marks.append(ranks.bytes_sent)
    out.sum().backward()
    marks.append(ranks.bytes_sent)
    return dict(zip(("assignment", "forward", "backward"), np.diff(marks).tolist(), strict=True))


def improved_traffic(rank: int, num_topics: int) -> dict[str, int]:
    """Bytes of improved attention by each way: fetching, heads for tokens, and whichever it chooses."""
    ranks, seen = everyone(), {}
    q, k, v, _ = clustered_heads(length=400)
    # Queries of few topics have few strongest keys in common; those of many need nearly all.
    topics = 4 * draw(num_topics, 8, seed=5)
    q = q * 0.01 + topics[torch.arange(400) % num_topics]
    plan = ClusterPlan(ranks=ranks, length=400, num_clusters=num_topics)
    clusters = (torch.arange(400) % num_topics).expand(2, 6, -1)
    for name, ratio in {"fetched": 1e9, "by heads": -1.0, "chosen": 1.0}.items():
        before = ranks.bytes_sent
        own = (own_rows(x, plan) for x in (q, k, v, clusters))
        improved_clustered_attention(*own, plan, top_k=8, max_fetch_ratio=ratio)
        seen[name] = ranks.bytes_sent - before
    return seen


# The speech model

CONFIG = CtcTransformerConfig(
    num_layers=2, dim=16, num_heads=4, hidden_dim=24, num_mels=8, stem_channels=4, kernel_size=5, dropout=0.0
)
ATTENTIONS: dict[str, ClusteredAttentionConfig | None] = {
    "full": None,
    "improved": ClusteredAttentionConfig(num_clusters=8, top_k=5, iterations=3),
    "plain": ClusteredAttentionConfig(num_clusters=8, top_k=0, iterations=3),
    "improved, full for short samples": ClusteredAttentionConfig(num_clusters=8, top_k=5, full_below=20),
}
NUM_FRAMES = [61, 30, 9]


def make_model(attention: str) -> CtcTransformer:
    torch.manual_seed(0)
    return CtcTransformer(replace(CONFIG, attention=ATTENTIONS[attention]), num_classes=5)


def speech() -> tuple[Tensor, Tensor]:
    return draw(3, max(NUM_FRAMES), CONFIG.num_mels, seed=1), torch.tensor(NUM_FRAMES)


def spread(model: CtcTransformer, num_segments: int = 1) -> ParallelCtcTransformer:
    num_ranks = dist.get_world_size()
    ulysses = 2 if num_ranks > 1 else 1
    return parallelize(model, everyone(), parallel(ulysses, num_ranks // ulysses, "basic"), num_segments=num_segments)


def speech_errors(rank: int, attention: str) -> Errors:
    """Largest errors of log-probabilities and of the weights' gradients beside the model on one rank."""
    model = make_model(attention)
    features, lengths = speech()
    wanted, _ = model(features, lengths)
    is_token = (torch.arange(wanted.shape[1]) < count_tokens(lengths)[:, None])[..., None]
    gradient = draw(*wanted.shape, seed=2) * is_token
    (wanted * gradient).sum().backward()

    part = spread(model)
    log_probs, _ = part(part.shard(features), lengths)
    found = part.gather(log_probs, lengths)
    ((found * gradient).sum() / dist.get_world_size()).backward()
    part.sum_gradients()
    errors = {"log-probabilities": error(found * is_token, wanted * is_token)}
    weights = dict(part.model.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert weights[name].grad is not None, name
        errors[name] = error(weights[name].grad, weight.grad)
    return errors


def losses(rank: int, num_steps: int) -> list[float]:
    """Losses of training on one batch."""
    part = spread(make_model("improved"))
    features, lengths = speech()
    own, optimiser = part.shard(features), torch.optim.SGD(part.parameters(), lr=0.05)
    seen = []
    for _ in range(num_steps):
        optimiser.zero_grad()
        log_probs = part.gather(part(own, lengths)[0], lengths).transpose(0, 1)
        targets, target_lengths = torch.tensor([[1, 2, 3], [2, 2, 1], [4, 1, 0]]), torch.tensor([3, 3, 2])
        loss = ctc_loss(log_probs, targets, count_tokens(lengths), target_lengths)
        (loss / dist.get_world_size()).backward()
        part.sum_gradients()
        optimiser.step()
        seen.append(float(loss))
    return seen


def segmented(rank: int) -> list[float]:
    """Log-probabilities of a model whose clusters are local to 4 segments."""
    part = spread(make_model("improved"), num_segments=4)
    features, lengths = speech()
    with torch.no_grad():
        log_probs = part.gather(part(part.shard(features), lengths)[0], lengths)
    is_token = (torch.arange(log_probs.shape[1]) < count_tokens(lengths)[:, None])[..., None]
    return (log_probs * is_token).flatten().tolist()


def halo_too_wide(rank: int) -> tuple[str, int]:
    """The error's message and the bytes sent before it, for a recording shorter than the halos of its parts."""
    ranks = Communicator(axes(dist.get_world_size(), 1)[0])
    try:
        borrow_tokens(torch.zeros(1, 2, 3), ranks, dim=1, left=1, right=4)
    except ValueError as refusal:
        return str(refusal), ranks.bytes_sent
    return "", ranks.bytes_sent
