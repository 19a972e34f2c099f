"""Plan sequence parallelism before anything is run: `python -m models.parallel COMMAND`.

plan     degrees and layout of attention for a machine, with the alternatives
volumes  what a training step sends and holds on each rank, spread in many ways
"""

import argparse

from models.parallel.costs import Workload
from models.parallel.planner import Question, render_plan
from models.parallel.prediction import Device
from models.parallel.topology import LINKS, parse_topology
from models.parallel.transformer_costs import TRANSFORMERS, Step, render_volumes

# Of an A100: fitted to the paper's table 3 by `python -m benchmarks.parallel_fit`, see docs/parallel.md, but for the
# bandwidth, which is NVIDIA's data sheet's.
ATTENTION_TERAFLOPS, BLOCK_MICROSECONDS, MEMORY_GIGABYTES = 170.0, 170.0, 2000.0


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and print.

    Args:
        arguments: None is those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m models.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands.add_parser("plan", help="degrees and layout of attention for a machine"))
    _add_volumes(commands.add_parser("volumes", help="volumes and memory of a training step"))
    chosen = parser.parse_args(arguments)
    try:
        print(_plan(chosen) if chosen.command == "plan" else _volumes(chosen))
    except ValueError as error:
        parser.error(str(error))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", type=int, required=True, help="heads of queries")
    parser.add_argument("--length", type=int, required=True, help="tokens of the whole sequence")
    parser.add_argument(
        "--topology",
        required=True,
        help="sizes, the outermost first, and links, the innermost first: 8:nvlink, 2x4:nvlink/ib, 4:10@20^1; "
        f"a link is {', '.join(LINKS)}, or GB/s of a rank @ microseconds ^ contention, see models/parallel/topology.py",
    )
    parser.add_argument("--key-heads", type=int, help="heads of keys and values, as many as of queries by default")
    parser.add_argument("--head-dim", type=int, default=64, help="size of a head (64)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    parser.add_argument("--item-bytes", type=int, default=2, choices=(2, 4, 8), help="of a number (2)")
    parser.add_argument("--causal", action="store_true", help="queries see no later keys")
    parser.add_argument("--backward", action="store_true", help="gradients are computed, too")
    parser.add_argument("--clusters", type=int, help="shows clustered attention beside it")
    parser.add_argument("--max-memory", type=float, help="most GB of a rank")
    parser.add_argument(
        "--teraflops", type=float, default=ATTENTION_TERAFLOPS, help=f"of attention on a rank ({ATTENTION_TERAFLOPS})"
    )
    parser.add_argument(
        "--memory-bandwidth",
        type=float,
        default=MEMORY_GIGABYTES,
        help=f"GB/s of a rank's own memory ({MEMORY_GIGABYTES})",
    )
    parser.add_argument(
        "--block-microseconds",
        type=float,
        default=BLOCK_MICROSECONDS,
        help=f"fixed time of a block of attention ({BLOCK_MICROSECONDS})",
    )


def _add_volumes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=TRANSFORMERS, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences of all ranks together (1)")


def _plan(chosen: argparse.Namespace) -> str:
    if chosen.teraflops <= 0 or chosen.memory_bandwidth <= 0 or chosen.block_microseconds < 0:
        raise ValueError(
            f"teraflops={chosen.teraflops} and memory-bandwidth={chosen.memory_bandwidth} must be above 0, "
            f"block-microseconds={chosen.block_microseconds} not below"
        )
    question = Question(
        work=Workload(
            length=chosen.length,
            num_heads=chosen.heads,
            num_key_heads=chosen.key_heads,
            head_dim=chosen.head_dim,
            batch=chosen.batch,
            item_bytes=chosen.item_bytes,
        ),
        topology=parse_topology(chosen.topology),
        device=Device(
            flops_per_second=chosen.teraflops * 1e12,
            block_seconds=chosen.block_microseconds * 1e-6,
            memory_bytes_per_second=chosen.memory_bandwidth * 1e9,
        ),
        is_causal=chosen.causal,
        has_backward=chosen.backward,
        max_memory_bytes=None if chosen.max_memory is None else int(chosen.max_memory * 1e9),
    )
    return render_plan(question, num_clusters=chosen.clusters)


def _volumes(chosen: argparse.Namespace) -> str:
    if min(chosen.ranks, chosen.length, chosen.batch) < 1:
        raise ValueError(f"ranks={chosen.ranks}, length={chosen.length} and batch={chosen.batch} must be at least 1")
    table = render_volumes(TRANSFORMERS[chosen.model], chosen.ranks, Step(length=chosen.length, batch=chosen.batch))
    return f"GB of one rank, in one training step of {chosen.model}:\n\n{table}"


if __name__ == "__main__":
    main()
