"""What one training step of a transformer sends, holds and takes on each rank: data, tensor, sequence and pipeline.

Ranks are tensor · ulysses · ring · data · pipeline, the first ones neighbours, as the paper orders them (tip 7). Tensor
parallelism is the kind that also spreads tokens between its layers ("TP-sp"). A pipeline works sequence by sequence;
its numbers are those of its first rank. Mixed precision with Adam: 2 bytes for a weight and for its gradient, 12 for
its float32 copy and moments.

Source: Fang and Zhao 2024 (USP), section 4 and table 2; Korthikanti et al. 2022 (sequence parallelism of Megatron) for
activations.
Differs: the paper counts whole tensors in exchanges of heads, here it is what one rank sends; that is 1/G of it.
Deliberately absent: recomputing activations, offloading, overlap of gradients with computing.
"""

from dataclasses import dataclass, replace

from models.parallel.costs import Workload, usp_bytes
from models.parallel.prediction import Device, Spread, predict
from models.parallel.topology import Topology

ITEM_BYTES = 2  # bfloat16
OPTIMISER_BYTES = 12  # float32 weight and two moments: the paper's "6P", in units of 2 bytes
EXCHANGES_OF_TENSOR = 8  # a block gathers and scatters its tokens four times each, forward and backward: table 2


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """The numbers of a decoder.

    Attributes:
        num_layers: blocks.
        model_dim: E.
        hidden_dim: of the gated feed-forward layer.
        num_heads, num_key_heads: H and J.
        num_words: of the vocabulary.
    """

    num_layers: int
    model_dim: int
    hidden_dim: int
    num_heads: int
    num_key_heads: int
    num_words: int

    @property
    def head_dim(self) -> int:
        """D."""
        return self.model_dim // self.num_heads

    @property
    def key_dim(self) -> int:
        """All heads of keys together."""
        return self.num_key_heads * self.head_dim

    @property
    def block_weights(self) -> int:
        """Weights of a block, norms left out."""
        return 2 * self.model_dim * (self.model_dim + self.key_dim) + 3 * self.model_dim * self.hidden_dim

    @property
    def num_weights(self) -> int:
        """Weights in all, of words read and words written too."""
        return self.num_layers * self.block_weights + 2 * self.model_dim * self.num_words

    @property
    def multiplied_weights(self) -> int:
        """Weights that every token is multiplied with."""
        return self.num_weights - self.model_dim * self.num_words


# From the models' cards: Touvron et al. 2023 (Llama 2), and the config.json of Llama 3.
TRANSFORMERS = {
    "llama2-7b": Transformer(
        num_layers=32, model_dim=4096, hidden_dim=11008, num_heads=32, num_key_heads=32, num_words=32000
    ),
    "llama3-8b": Transformer(
        num_layers=32, model_dim=4096, hidden_dim=14336, num_heads=32, num_key_heads=8, num_words=128256
    ),
}


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How a training step is spread.

    Attributes:
        tensor, ulysses, ring, data, pipeline: ranks of each kind; their product is all ranks.
        zero: what all ranks that hold the same weights share: 1 the optimiser's numbers, 2 gradients too, 3 weights
            too; 0 nothing.
    """

    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    data: int = 1
    pipeline: int = 1
    zero: int = 0

    @property
    def num_ranks(self) -> int:
        """All ranks."""
        return self.num_copies * self.tensor * self.pipeline

    @property
    def num_copies(self) -> int:
        """Ranks that hold the same weights: each sees other tokens."""
        return self.ulysses * self.ring * self.data


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step.

    Attributes:
        length: tokens of a sequence.
        batch: sequences, of all ranks together.
    """

    length: int
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Volumes:
    """Bytes of one rank: sent in one step, and held."""

    weights_sent: int
    tensor_sent: int
    exchange_sent: int
    ring_sent: int
    pipeline_sent: int
    weights_held: int
    optimiser_held: int
    activations_held: int

    @property
    def held(self) -> int:
        """All that is held."""
        return self.weights_held + self.optimiser_held + self.activations_held


def check(model: Transformer, degrees: Degrees, step: Step) -> None:
    """See whether a step can be spread so.

    Raises: ValueError.
    """
    if model.num_heads % (degrees.tensor * degrees.ulysses):
        raise ValueError(
            f"tensor={degrees.tensor} times ulysses={degrees.ulysses} must divide {model.num_heads} heads; take a ring"
        )
    if step.batch % degrees.data or model.num_layers % degrees.pipeline:
        raise ValueError(
            f"data={degrees.data} must divide a batch of {step.batch}, and pipeline={degrees.pipeline} "
            f"{model.num_layers} layers"
        )


def count_volumes(model: Transformer, degrees: Degrees, step: Step) -> Volumes:
    """Count what a rank sends and holds.

    Raises: ValueError if the step cannot be spread so.
    """
    check(model, degrees, step)
    layers, t, n = model.num_layers // degrees.pipeline, degrees.tensor, degrees.num_copies
    tokens = step.batch * step.length // n  # of this rank, before tensor ranks share them
    at_once = min(step.batch // degrees.data, degrees.pipeline) if degrees.pipeline > 1 else step.batch // degrees.data
    kept_tokens = at_once * step.length // (degrees.ulysses * degrees.ring)
    work = _attention(model, degrees, step)
    both = usp_bytes(work, ulysses=degrees.ulysses, ring=degrees.ring)
    ring = usp_bytes(_one_ulysses_rank(work, degrees), ulysses=1, ring=degrees.ring)
    ring_sent = layers * (ring.forward + ring.backward)
    weights = (
        ITEM_BYTES * (layers * model.block_weights + (model.num_weights - _blocks(model)) // degrees.pipeline) // t
    )
    passes = 3 if degrees.zero == 3 else 2  # gather and scatter; one more gather where weights are shared
    return Volumes(
        weights_sent=passes * weights * (n - 1) // n,
        tensor_sent=layers * EXCHANGES_OF_TENSOR * tokens * model.model_dim * ITEM_BYTES * (t - 1) // t,
        exchange_sent=layers * (both.forward + both.backward) - ring_sent,
        ring_sent=ring_sent,
        pipeline_sent=2 * tokens * model.model_dim * ITEM_BYTES // t if degrees.pipeline > 1 else 0,
        weights_held=weights // (n if degrees.zero == 3 else 1) + weights // (n if degrees.zero >= 2 else 1),
        optimiser_held=weights // ITEM_BYTES * OPTIMISER_BYTES // (n if degrees.zero >= 1 else 1),
        activations_held=layers * kept_tokens * _kept_numbers(model) * ITEM_BYTES // t,
    )


def step_seconds(
    model: Transformer, degrees: Degrees, step: Step, topology: Topology, attention: Device, *, dense_rate: float
) -> float:
    """Predict the time of one step without a pipeline; causal attention, layout "zigzag".

    Args:
        attention: what a rank computes of attention, forward and backward.
        dense_rate: operations a second of everything else.
    Raises: ValueError if the step cannot be spread so.
    """
    check(model, degrees, step)
    assert degrees.pipeline == 1
    spread = Spread(ulysses=degrees.ulysses, ring=degrees.ring, layout="zigzag", tensor=degrees.tensor)
    work = _attention(model, degrees, step)
    called = predict(work, spread, topology, attention, is_causal=True, has_backward=True).seconds
    dense = 6 * model.multiplied_weights * step.batch * step.length / degrees.num_ranks / dense_rate
    token_bytes = step.batch * step.length // degrees.num_copies * model.model_dim * ITEM_BYTES
    gathered = EXCHANGES_OF_TENSOR * topology.collective_seconds(range(degrees.tensor), token_bytes)
    same_weights = range(0, degrees.num_ranks, degrees.tensor)
    shared = 2 * topology.collective_seconds(same_weights, model.num_weights * ITEM_BYTES / degrees.tensor)
    return dense + model.num_layers * (called + gathered) + shared


def full_flops(model: Transformer, step: Step) -> float:
    """Operations of a step as the paper counts them: attention as if no key were hidden."""
    tokens = step.batch * step.length
    return 6.0 * model.multiplied_weights * tokens + _attention_flops(model, step)


def causal_flops(model: Transformer, step: Step) -> float:
    """Operations of a step that a causal mask leaves: half of attention."""
    return full_flops(model, step) - _attention_flops(model, step) / 2


def list_schemes(model: Transformer, num_ranks: int, step: Step) -> dict[str, Degrees]:
    """The rows of the paper's table 2 that fit, each spread over all ranks, and mixtures of them."""
    N = num_ranks
    ulysses = max(u for u in range(1, N + 1) if N % u == 0 and model.num_heads % u == 0)
    usp = Degrees(ulysses=min(ulysses, 8), ring=N // min(ulysses, 8)) if N % min(ulysses, 8) == 0 else Degrees(ring=N)
    half = Degrees(tensor=2, ulysses=usp.ulysses // 2 or 1, ring=N // 2 // (usp.ulysses // 2 or 1), zero=1)
    schemes = {
        "Ulysses": Degrees(ulysses=N),
        "ring": Degrees(ring=N),
        "data": Degrees(data=N),
        "data + ZeRO-1": Degrees(data=N, zero=1),
        "USP + ZeRO-1": replace(usp, zero=1),
        "USP + ZeRO-2": replace(usp, zero=2),
        "USP + ZeRO-3": replace(usp, zero=3),
        "tensor": Degrees(tensor=N),
        "tensor 2 x USP + ZeRO-1": half,
        "pipeline": Degrees(pipeline=N),
        "pipeline 2 x USP + ZeRO-1": Degrees(pipeline=2, ulysses=half.ulysses, ring=half.ring, zero=1),
    }
    return {name: degrees for name, degrees in schemes.items() if _fits(model, degrees, step, N)}


def render_volumes(model: Transformer, num_ranks: int, step: Step) -> str:
    """Write the table of schemes as Markdown."""
    columns = ["scheme", "tensor, ulysses, ring, data, pipeline"]
    columns += [f"sent: {what}" for what in ("weights", "tensor", "exchanges", "ring", "pipeline")]
    columns += ["weights and gradients", "optimiser", "activations", "held"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, degrees in list_schemes(model, num_ranks, step).items():
        found = count_volumes(model, degrees, step)
        sent = found.weights_sent, found.tensor_sent, found.exchange_sent, found.ring_sent, found.pipeline_sent
        held = found.weights_held, found.optimiser_held, found.activations_held, found.held
        shape = degrees.tensor, degrees.ulysses, degrees.ring, degrees.data, degrees.pipeline
        cells = " | ".join(f"{x / 1e9:.2f}" for x in (*sent, *held))
        lines.append(f"| {name} | {', '.join(map(str, shape))} | {cells} |")
    return "\n".join(lines)


def _fits(model: Transformer, degrees: Degrees, step: Step, num_ranks: int) -> bool:
    try:
        check(model, degrees, step)
    except ValueError:
        return False
    return degrees.num_ranks == num_ranks


def _attention(model: Transformer, degrees: Degrees, step: Step) -> Workload:
    """One call on the ranks of one sequence, heads of one tensor rank."""
    return Workload(
        length=step.length,
        num_heads=model.num_heads // degrees.tensor,
        num_key_heads=max(1, model.num_key_heads // degrees.tensor),
        head_dim=model.head_dim,
        batch=step.batch // degrees.data,
        item_bytes=ITEM_BYTES,
    )


def _one_ulysses_rank(work: Workload, degrees: Degrees) -> Workload:
    """What goes round the ring: after the exchange, a rank has its part of the heads."""
    u = degrees.ulysses
    return replace(work, num_heads=work.num_heads // u, num_key_heads=max(1, work.key_heads // u))


def _blocks(model: Transformer) -> int:
    return model.num_layers * model.block_weights


def _kept_numbers(model: Transformer) -> int:
    """Numbers of a token that a block keeps for backward: inputs of norms and products, q, k, v, gates."""
    return 6 * model.model_dim + 2 * model.key_dim + 3 * model.hidden_dim


def _attention_flops(model: Transformer, step: Step) -> float:
    return 12.0 * model.num_layers * step.batch * step.length**2 * model.model_dim
