"""A rank without torch, that does what its inputs say: `python -m tests.service.runtimes.fake_rank`."""

import os
import sys
import time
from typing import Any

from service.runtimes.frames import read_frame, write_frame

WELL, SLEEP, FAIL = 0, 1, 2  # what an input can tell it to do
FAULT = "the fault of rank 1"


def main() -> None:
    requests: Any = sys.stdin.buffer
    answers: Any = sys.stdout.buffer
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    opening, _ = read_frame(requests)
    write_frame(answers, {"kind": "ready", "version": opening["version"], "device": "cpu"}, {})
    while True:
        facts, inputs = read_frame(requests)
        wish = int(inputs["wish"][0])
        if wish == FAIL and rank == 1:
            sys.exit(f"{FAULT}\n")
        if wish != WELL:
            time.sleep(60)
        write_frame(answers, {"kind": "busy"}, {})
        outputs = dict.fromkeys(facts["outputs"], inputs["x"] * size) if rank == 0 else {}
        cost = {"seconds": 3.0 + rank, "waiting_seconds": 1.0, "sent_bytes": 10}
        write_frame(answers, {"kind": "done", **cost}, outputs)


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        sys.exit()
