import io
import json
import random
import time
import tracemalloc

import numpy as np
import pytest

from service.errors import InvalidInput
from service.tasks.connectome_formats import Table, read_connectome

MATRIX = np.array([[0, 0.25, -0.5], [0.25, 0, 1], [-0.5, 1, 0]])
NPY_MAGIC = b"\x93NUMPY\x01\x00"


def npy(array: object, *, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version)
    return file.getvalue()


def raw_npy(header: str, data: bytes = b"") -> bytes:
    return NPY_MAGIC + len(header).to_bytes(2, "little") + header.encode() + data


def refusal(body: bytes, media_type: str = "") -> str:
    with pytest.raises(InvalidInput) as caught:
        read_connectome(body, media_type)
    message = str(caught.value)
    assert message.count("; ") >= 2
    assert len(message) < 600
    return message


def check(table: Table, *, kind: str | None) -> None:
    np.testing.assert_array_equal(table.values, MATRIX, strict=True)
    assert (table.kind, table.names) == (kind, ())


# What is read


@pytest.mark.parametrize("kind", ["connectivity", "time_series"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n  "], ids=["plain", "byte order mark", "blank"])
@pytest.mark.parametrize("media_type", ["", "application/json", "text/plain"])
def test_json_says_what_it_holds(kind: str, start: bytes, media_type: str) -> None:
    check(read_connectome(start + json.dumps({kind: MATRIX.tolist()}).encode(), media_type), kind=kind)


def test_json_may_have_whole_numbers_and_truth_values() -> None:
    table = read_connectome(b'{"connectivity": [[false, 1, 2e0], [true, 0, -3]]}', "")
    np.testing.assert_array_equal(table.values, [[0, 1, 2], [1, 0, -3]])


@pytest.mark.parametrize("media_type", ["", "text/csv", "text/plain"])
def test_text_leaves_open_what_it_holds(media_type: str) -> None:
    check(read_connectome(b"0,.25,-.5\n.25,0,1\n-.5,1,0\n", media_type), kind=None)


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", ">f4", "<f2", ">f2"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_is_read_in_every_byte_order_and_layout(dtype: str, order: str, version: tuple[int, int]) -> None:
    array = np.asarray(MATRIX.astype(dtype), order=order)
    check(read_connectome(npy(array, version=version), "application/x-npy"), kind=None)


@pytest.mark.parametrize("dtype", ["?", "i1", "u1", "<i2", ">u2", "<i4", ">i8", "<u8"])
def test_npy_may_hold_whole_numbers_and_truth_values(dtype: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 0]], dtype)
    np.testing.assert_array_equal(read_connectome(npy(array), "").values, array.astype(float), strict=True)


def test_rows_and_columns_of_an_npy_keep_their_places() -> None:
    array = np.arange(12.0).reshape(3, 4)
    for body in (npy(array), npy(np.asfortranarray(array)), npy(array.T.copy().T)):
        np.testing.assert_array_equal(read_connectome(body, "").values, array)


# JSON that is refused


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"connectivity": [[0, 1], [1, 0]]', "the JSON cannot be read"),
        (b'{"connectivity": [[0, 1,], [1, 0]]}', "the JSON cannot be read"),
        (b'{"connectivity": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the JSON cannot be read"),
        (b"[" * 100_000, "the JSON cannot be read"),
        (b'{"a":' * 400, "the JSON cannot be read"),
        (b'{"a":' * 100_000, "more than 1000 texts or objects"),
        (b'{"connectivity": [' + b"[]," * 100_000 + b"[]]}", "more than 100000 rows"),
        (b'{"connectivity": [' + b'"",' * 1_000 + b"0]}", "more than 1000 texts or objects"),
        (b'{"connectivity": [[' + b"9" * 100_000 + b"]]}", "the JSON cannot be read"),
        (b'{"connectivity": [[0, 1], [1, 0]]} x', "the JSON cannot be read"),
        (b'{"connectivity": "\xff"}', "the JSON cannot be read"),
        (b"[[0, 1], [1, 0]]", "the JSON is no object"),
        (b"{}", "the JSON has nothing"),
        (b'{"matrix": [[0, 1], [1, 0]]}', "the JSON has matrix"),
        (b'{"connectivity": [[0]], "time_series": [[0]]}', "the JSON has connectivity, time_series"),
        (b'{"connectivity": [[0]], "label": 1}', "the JSON has connectivity, label"),
        (b'{"connectivity": [[0]], "connectivity": [[1]]}', '"connectivity" comes twice'),
        (b'{"connectivity": {"a": [1]}, "connectivity": [[1]]}', '"connectivity" comes twice'),
        (b'{"connectivity": [["0", "1"], ["1", "0"]]}', "or holds texts"),
        (b'{"connectivity": "0 1"}', "or holds texts"),
        (b'{"connectivity": {"0": [1]}}', "or holds texts or objects"),
        (b'{"connectivity": [[{}]]}', "is no table of numbers"),
        (b'{"connectivity": [[0, 1], [1]]}', "is no table of numbers"),
        (b'{"connectivity": [[0, [1]], [1, 0]]}', "is no table of numbers"),
        (b'{"connectivity": ' + b"[" * 100 + b"]" * 100 + b"}", "is no table of numbers"),
        (b'{"connectivity": [[1' + b"0" * 400 + b"]]}", "is no table of numbers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("media_type", ["", "application/json"])
def test_bad_json_is_refused(body: bytes, message: str, media_type: str) -> None:
    assert message in refusal(body, media_type)


@pytest.mark.parametrize("body", [b"0,1\n1,0\n", b"connectivity", b'"connectivity"', b"null", b"nan"])
def test_what_is_named_json_is_read_as_json(body: bytes) -> None:
    assert "the JSON" in refusal(body, "application/json")


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null"])
def test_numbers_that_are_not_finite_are_left_to_whoever_knows_the_regions(number: bytes) -> None:
    table = read_connectome(b'{"connectivity": [[0, ' + number + b"], [1, 0]]}", "")
    assert np.isfinite(table.values).tolist() == [[True, False], [True, True]]


# .npy that is refused


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (npy(np.array([[1.0, "a"]], dtype=object)), "elements of type |O"),
        (npy(np.array([["1", "2"]])), "elements of type <U1"),
        (npy(np.array([[1j, 2]])), "elements of type <c16"),
        (npy(np.zeros((2, 2), "<M8[s]")), "elements of type <M8[s]"),
        (npy(np.zeros((2, 2), [("x", "<f4")])), "elements of type ["),
        (npy(np.zeros(4)), "an array of shape (4,)"),
        (npy(np.zeros((1, 2, 2))), "an array of shape (1, 2, 2)"),
        (npy(np.float64(3)), "an array of shape ()"),
        (npy(np.zeros((0, 3))), "an array of shape (0, 3)"),
        (npy(MATRIX).replace(b"(3, 3)", b"(3 3,)"), "an array of shape (3 3,)"),
        (npy(MATRIX)[:-1], "announces 3 x 3 numbers of 8 bytes and has 71 bytes"),
        (npy(MATRIX) + b"\0", "and has 73 bytes"),
        (raw_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"), "and has 0 bytes"),
        (raw_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 10 + ", 9), }"), "and has 0 bytes"),
        (raw_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1), }"), "header that cannot be read"),
        (
            raw_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 9000 + ", 9), }"),
            f"of shape ({'9' * 40})",
        ),
        (raw_npy("{'descr': '<f3', 'fortran_order': False, 'shape': (1, 1), }", b"abc"), "elements of type <f3"),
        (raw_npy("{'descr': '<f8', 'shape': (1, 1), }", bytes(8)), "header that cannot be read"),
        (raw_npy("__import__('os').abort()", bytes(8)), "header that cannot be read"),
        (raw_npy("(" * 5000), "header that cannot be read"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "header that cannot be read"),
        (b"\x93NUMPY\x09\x00" + npy(MATRIX)[8:], "header that cannot be read"),
        (b"\x93NUMPY", "header that cannot be read"),
        (npy(MATRIX)[:40], "header that cannot be read"),
    ],
)
def test_bad_npy_is_refused(body: bytes, message: str) -> None:
    assert message in refusal(body, "application/x-npy")


def test_nothing_is_allocated_for_what_a_header_claims() -> None:
    body = raw_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (30000, 30000), }", bytes(64))
    tracemalloc.start()
    refusal(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# Whatever the bytes are


@pytest.mark.parametrize("body", [b"", b" \n\t ", b"\r\n"])
def test_an_empty_body_is_refused(body: bytes) -> None:
    assert refusal(body).startswith("the body is empty")


@pytest.mark.parametrize("body", [b"PK\x03\x04" + b"\xff" * 20, b"\x1f\x8b\x08\0\xff", b"\x5c\x01\0\0\x5c\x01\0\0 n+1"])
def test_other_files_are_refused(body: bytes) -> None:
    assert refusal(body)


def test_a_matrix_as_json_takes_little_time() -> None:
    values = np.random.default_rng(0).standard_normal((116, 116))
    body = json.dumps({"connectivity": values.tolist()}).encode()
    times = []
    for _ in range(5):
        start = time.thread_time()
        table = read_connectome(body, "application/json")
        times.append(time.thread_time() - start)
    np.testing.assert_array_equal(table.values, values)
    assert min(times) < 0.01  # about 1 ms


def test_damaged_bytes_give_numbers_or_invalid_input() -> None:
    rng = random.Random(11)
    seeds = [
        json.dumps({"connectivity": MATRIX.tolist()}).encode(),
        npy(MATRIX.astype(np.float32)),
        npy(np.asfortranarray(MATRIX), version=(2, 0)),
        b"0,.25,-.5\n.25,0,1\n-.5,1,0\n",
    ]
    pieces = [b"", b"[", b"]", b"{", b"}", b'"', b",", b"'", b"(", b"1", b"e9", b"-", b"\0", b"\xff", b"O", b"null"]
    outcomes = set()
    for number in range(6000):
        body = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.choice([1, 2, 6])):
            place = rng.randrange(min(len(body), rng.choice([16, 80, len(body)])) + 1)
            body[place : place + rng.randrange(4)] = rng.choice(pieces)
        try:
            table = read_connectome(bytes(body), rng.choice(["", "application/json"]))
        except InvalidInput:
            outcomes.add((number % len(seeds), "refused"))
        else:
            assert table.values.dtype == np.float64
            outcomes.add((number % len(seeds), "read"))
    assert outcomes == {(seed, end) for seed in range(len(seeds)) for end in ("read", "refused")}


@pytest.mark.parametrize(
    "body",
    [
        b'{"connectivity":[' + b"[]," * 6_000_000 + b"[]]}",
        b'{"connectivity":[' + b"{}," * 6_000_000 + b"{}]}",
        b"{" + b'"":0,' * 4_000_000 + b'"":0}',
    ],
    ids=["lists", "objects", "texts"],
)
def test_json_of_millions_of_parts_is_refused_quickly(body: bytes) -> None:
    started = time.thread_time()
    assert "the JSON has more than" in refusal(body)
    assert time.thread_time() - started < 0.5  # parsing it takes seconds, in which no other thread runs
