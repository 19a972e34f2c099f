"""One rank of a group that answers for the service: `python -m models.parallel.worker`, started as torchrun does.

That is, with `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` in the environment. Where one of them is given the
number of a socket that listens at that port, which it inherited, it keeps the store there by which all find each other;
then each has `TORCHELASTIC_USE_AGENT_STORE=True`, too.

Frames come on standard input and go on standard output (`models.parallel.frames`); what anything prints goes to
standard error. The first frame says what to build (`Opening`), and is answered by `ready`. Every further one holds the
inputs of the exported program, whole and the same on all ranks, and names outputs; meanwhile a rank says `busy` after
each layer, and at the end `done`, rank 0 with the outputs. The process ends when its standard input does, and on any
error: a group that lost a rank is of no further use.

Source: the outputs are those of the exported speech recogniser, `docs/models.md`.
Deliberately absent: starting the other ranks, and starting again; whoever started this process does that.
"""

import hashlib
import io
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor

from models import BUILDERS
from models.ctc_transformer import CtcTransformer, count_tokens, is_real
from models.parallel.collectives import Communicator
from models.parallel.frames import Arrays, read_frame, write_frame
from models.parallel.speech import ParallelCtcTransformer, parallelize
from models.parallel.usp import SequenceParallel, sequence_mesh

Frame = tuple[dict[str, Any], Arrays]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a rank has to build.

    Attributes:
        architecture: key of the model among the builders.
        num_classes: V.
        weights: safetensors file.
        sha256: of that file, hexadecimal.
        mean, std: of the features, one number for all bands or one for each.
        device: "cpu"; "cuda", every GPU; "cuda:0,cuda:1", these; "auto", GPUs where there are any.
        num_threads: of this rank on the CPU.
        timeout_seconds: longest wait for another rank.
    """

    architecture: str
    num_classes: int
    weights: str
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: str
    num_threads: int
    timeout_seconds: float


class Rank:
    """This process's part in every recording.

    Args:
        model: in evaluation mode.
        opening: what it is fed with and how long it waits.
        device: of this rank.
    """

    def __init__(self, model: CtcTransformer, opening: Opening, device: torch.device) -> None:
        self.device = device
        num_ranks, timeout_seconds = dist.get_world_size(), opening.timeout_seconds
        # Heads are exchanged as far as they go; what is left is a ring.
        ulysses = gcd(num_ranks, model.config.num_heads)
        mesh = sequence_mesh(ulysses=ulysses, ring=num_ranks // ulysses, device_type=device.type)
        groups = mesh.get_group("ulysses"), mesh.get_group("ring")
        self._dense = SequenceParallel(*groups, timeout_seconds=timeout_seconds)
        self._ranks = Communicator(dist.group.WORLD, timeout_seconds=timeout_seconds)
        self.part: ParallelCtcTransformer = parallelize(model, self._ranks, self._dense).to(device)
        self._mean, self._std = (torch.tensor(numbers, device=device) for numbers in (opening.mean, opening.std))

    @torch.inference_mode()
    def run(self, inputs: Arrays, outputs: Sequence[str]) -> Frame:
        """Answer; every rank has to call it.

        Args:
            inputs: `features` (B, T, F) float32 and `lengths` (B,) int64, how many of the T frames are real; features
                are taken out, so that they need not outlast the moment when this rank takes its part.
            outputs: `log_probs`, `clusters`.
        Returns: what it took, and on rank 0 the outputs wanted, (B, N, V) and (B, layers, H, N).
        """
        begun, sent, waited = time.perf_counter(), self._bytes_sent(), self._seconds_waiting()
        lengths = torch.from_numpy(inputs["lengths"]).to(self.device)
        features = inputs.pop("features")
        num_tokens = int(count_tokens(torch.tensor(features.shape[1])))
        own = self.part.shard(torch.from_numpy(features)).to(self.device)
        del features
        log_probs, clusters = self.part((own - self._mean) / self._std, lengths)
        found = {"log_probs": log_probs.transpose(0, 1)}  # (slots, B, V)
        if clusters and "clusters" in outputs:
            found["clusters"] = torch.stack(clusters, dim=1).int().permute(3, 0, 1, 2)  # (slots, B, layers, H)
        whole = {name: self._bring(found[name])[:num_tokens] for name in outputs}
        answer = {name: rows.movedim(0, 1 if name == "log_probs" else -1) for name, rows in whole.items()}
        if self._ranks.rank == 0 and "log_probs" in answer:
            is_padding = is_real(answer["log_probs"], count_tokens(lengths)) == 0
            answer["log_probs"] = answer["log_probs"].masked_fill(is_padding, 0)
        arrays = {name: x.cpu().numpy() for name, x in answer.items()} if self._ranks.rank == 0 else {}
        cost = {"sent_bytes": self._bytes_sent() - sent, "waiting_seconds": self._seconds_waiting() - waited}
        return cost | {"seconds": time.perf_counter() - begun}, arrays

    def _bring(self, rows: Tensor) -> Tensor:
        """Bring all ranks' rows (slots, …) to rank 0, in order; none elsewhere."""
        size = self._ranks.size
        num_sent = [len(rows)] + [0] * (size - 1)
        num_received = [len(rows) if self._ranks.rank == 0 else 0] * size
        return self._ranks.exchange_rows(rows, num_sent, num_received).wait()

    def _bytes_sent(self) -> int:
        return self._ranks.bytes_sent + self._dense.bytes_sent

    def _seconds_waiting(self) -> float:
        return sum(group.seconds_waiting for group in (self._ranks, self._dense.ulysses, self._dense.ring))


def host_store(listener: int) -> object:
    """Keep the store by which ranks find each other, for as long as it is referred to.

    Args:
        listener: number of a socket that listens; it is the store's from then on.
    """
    with socket.socket(fileno=os.dup(listener)) as copy:
        host, port = copy.getsockname()
    store: object = dist.TCPStore(  # type: ignore[attr-defined]  # torch does not mark it as exported
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener
    )
    return store


def open_rank(opening: Opening) -> Rank:
    """Join the group and build the model.

    Raises: ValueError if the weights are not those meant, the model is of a kind that cannot be spread, or there are
        more ranks than GPUs.
    """
    is_cuda = opening.device.startswith("cuda") or (opening.device == "auto" and torch.cuda.is_available())
    torch.set_num_threads(opening.num_threads)
    dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timedelta(seconds=opening.timeout_seconds))
    device = torch.device("cpu")
    if is_cuda:
        named = [int(name.removeprefix("cuda:")) for name in opening.device.split(",") if ":" in name]
        gpus = named or list(range(torch.cuda.device_count()))
        if dist.get_world_size() > len(gpus):
            raise ValueError(f"{dist.get_world_size()} ranks need a GPU each; there are {len(gpus)}: {gpus}")
        device = torch.device("cuda", gpus[dist.get_rank()])
        torch.cuda.set_device(device)
    return Rank(load_model(opening), opening, device)


def load_model(opening: Opening) -> CtcTransformer:
    """Build the model with its weights, in evaluation mode.

    Raises: ValueError if the file is not the one meant, or the model is of a kind that cannot be spread.
    """
    content = Path(opening.weights).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != opening.sha256:
        raise ValueError(f"{opening.weights} has sha256 {found}, expected {opening.sha256}; export the bundle again")
    model = BUILDERS[opening.architecture](num_classes=opening.num_classes)
    if not isinstance(model, CtcTransformer):
        raise ValueError(f"{opening.architecture} cannot be spread over ranks; a CtcTransformer can")
    model.load_state_dict({name: weight.float() for name, weight in load(content).items()})
    return model.eval()


def main() -> None:
    """Take the pipes, build what the first frame says, answer all others."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write between frames
    frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    requests = sys.stdin.buffer
    assert isinstance(requests, io.BufferedReader)
    threading.Thread(target=_listen, args=(requests, frames), daemon=True).start()
    _store = host_store(int(sys.argv[1])) if len(sys.argv) > 1 else None  # for as long as this process
    facts, _ = frames.get()
    rank = open_rank(Opening(**facts))
    for layer in rank.part.model.layers:
        layer.register_forward_hook(lambda *_: write_frame(answers, {"kind": "busy"}, {}))
    write_frame(answers, {"kind": "ready", "version": torch.__version__, "device": rank.device.type}, {})
    while True:
        facts, inputs = frames.get()
        cost, arrays = rank.run(inputs, facts["outputs"])
        write_frame(answers, {"kind": "done", **cost}, arrays)


def _listen(requests: io.BufferedReader, frames: "queue.SimpleQueue[Frame]") -> None:
    """Read ahead, so that the end of the service ends this process even amid a recording."""
    while True:
        try:
            frames.put(read_frame(requests))
        except EOFError:
            os._exit(0)  # the main thread may be waiting for other ranks, who are ending, too
        except Exception:  # noqa: BLE001 - no frame came, and where the next one begins cannot be found
            traceback.print_exc()
            os._exit(1)


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001 - whatever it is, this rank ends, without waiting for its other threads
        traceback.print_exc()
        os._exit(1)
