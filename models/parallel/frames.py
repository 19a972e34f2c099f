"""Frames: what the service and a rank say to each other over a pipe.

A frame is one line of JSON, an object of facts whose `arrays` lists name, numpy type and shape of each array, and then
the arrays' bytes, one after the other, in C order. No pickles. The service's half is `service/runtimes/frames.py`.
"""

import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


def write_frame(pipe: io.BufferedWriter, facts: dict[str, Any], arrays: Arrays) -> None:
    """Write a frame.

    Raises: OSError if nobody reads any longer.
    """
    contents = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    told = [(name, array.dtype.str, array.shape) for name, array in contents.items()]
    pipe.write(json.dumps(facts | {"arrays": told}).encode() + b"\n")
    pipe.writelines(array.reshape(-1).view(np.uint8).data for array in contents.values())
    pipe.flush()


def read_frame(pipe: io.BufferedReader) -> tuple[dict[str, Any], Arrays]:
    """Read the next frame: facts, and arrays that may be written to.

    Raises: EOFError if the pipe was closed.
    """
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the pipe was closed")
    facts: dict[str, Any] = json.loads(line)
    arrays: Arrays = {}
    for name, dtype, shape in facts.pop("arrays"):
        array = np.empty(shape, dtype)
        if pipe.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
            raise EOFError(f"the pipe was closed within {name}")
        arrays[name] = array
    return facts, arrays
