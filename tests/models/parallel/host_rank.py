"""What `test_two_hosts` starts by torchrun on each host: `host_rank.py FOLDER`, one file of answers a rank."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from models.parallel.usp import SequenceParallel, sequence_mesh
from tests.models.parallel.cases import error
from tests.models.parallel.laws import draw, reference

LENGTH, NUM_HEADS, HEAD_DIM = 1024, 4, 32


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    per_host = int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = sequence_mesh(ulysses=per_host, ring=dist.get_world_size() // per_host)
    sp = SequenceParallel(mesh.get_group("ulysses"), mesh.get_group("ring"), timeout_seconds=30.0)
    heads = [draw(1, NUM_HEADS, LENGTH, HEAD_DIM, seed=i) for i in range(4)]
    q, k, v, d_out = (sp.shard(x, dim=2) for x in heads)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = sp.attend(q, k, v, length=LENGTH)
    found = (out, *torch.autograd.grad(out, (q, k, v), d_out))
    expected = reference(heads, None, is_causal=False)
    errors = {n: error(x, sp.shard(expected[n], dim=2)) for n, x in zip(("out", "dq", "dk", "dv"), found, strict=True)}
    answer = {"errors": errors, "ring_bytes": sp.ring.bytes_sent, "ulysses_bytes": sp.ulysses.bytes_sent}
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
