import io

import numpy as np
import pytest

from models.parallel import frames as of_ranks
from service.runtimes import frames as of_service
from service.sample import Arrays

ARRAYS: Arrays = {
    "features": np.arange(24, dtype=np.float32).reshape(1, 6, 4).transpose(0, 2, 1),  # not in C order
    "lengths": np.array([6], dtype=np.int64),
    "none": np.zeros((0, 3), dtype=np.int32),
}
HALVES = {"service": of_service, "ranks": of_ranks}


def make_frame(half: str = "service") -> bytes:
    raw = io.BytesIO()
    pipe = io.BufferedWriter(raw)
    HALVES[half].write_frame(pipe, {"kind": "done", "seconds": 0.5}, ARRAYS)
    return raw.getvalue()


def open_pipe(content: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(content))


@pytest.mark.parametrize("reader", HALVES)
@pytest.mark.parametrize("writer", HALVES)
def test_both_halves_read_what_both_write(writer: str, reader: str) -> None:
    pipe = open_pipe(make_frame(writer) * 2)
    for _ in range(2):
        facts, arrays = HALVES[reader].read_frame(pipe)
        assert facts == {"kind": "done", "seconds": 0.5}
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array, strict=True)
            assert arrays[name].flags.writeable


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_pipe_that_ends_within_a_frame_is_told(half: str, kept: int) -> None:
    with pytest.raises(EOFError, match="the pipe was closed"):
        HALVES[half].read_frame(open_pipe(make_frame()[:kept]))


def test_a_frame_holds_no_pickles() -> None:
    with pytest.raises(TypeError, match="references"):
        of_service.read_frame(open_pipe(b'{"arrays": [["x", "|O", [1]]]}\n12345678'))
