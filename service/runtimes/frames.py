"""Frames: what the service and a rank say to each other over a pipe.

The other half of `models/parallel/frames.py`, which tells the format: a line of JSON, then the bytes of arrays.
"""

import io
import json
from typing import Any

import numpy as np

from service.sample import Arrays

Facts = dict[str, Any]


def write_frame(pipe: io.BufferedWriter, facts: Facts, arrays: Arrays) -> None:
    """Write a frame.

    Raises: OSError if nobody reads any longer.
    """
    contents = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    told = [(name, array.dtype.str, array.shape) for name, array in contents.items()]
    pipe.write(json.dumps(facts | {"arrays": told}).encode() + b"\n")
    pipe.writelines(array.reshape(-1).view(np.uint8).data for array in contents.values())
    pipe.flush()


def read_frame(pipe: io.BufferedReader) -> tuple[Facts, Arrays]:
    """Read the next frame.

    Raises: EOFError if the pipe was closed.
    """
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the pipe was closed")
    facts: Facts = json.loads(line)
    arrays: Arrays = {}
    for name, dtype, shape in facts.pop("arrays"):
        array = np.empty(shape, dtype)
        if pipe.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
            raise EOFError(f"the pipe was closed within {name}")
        arrays[name] = array
    return facts, arrays
