import random
import time

import numpy as np
import pytest

from service.errors import InvalidInput
from service.tasks.number_tables import read_text_table

EXPECTED = [[0.5, -1.25, 3], [2, 0.75, -4]]


def refusal(text: str | bytes) -> str:
    with pytest.raises(InvalidInput) as caught:
        read_text_table(text.encode() if isinstance(text, str) else text)
    message = str(caught.value)
    assert message.count("; ") >= 2
    return message


@pytest.mark.parametrize(
    "text",
    [
        "0.5,-1.25,3\n2,0.75,-4\n",
        "0.5,-1.25,3\n2,0.75,-4",
        "0.5, -1.25, 3\r\n2, 0.75, -4\r\n",
        "0.5;-1.25;3\n2;0.75;-4\n",
        "0,5;-1,25;3\n2;0,75;-4\n",
        "0.5\t-1.25\t3\n2\t0.75\t-4\n",
        "0,5\t-1,25\t3\n2\t0,75\t-4\n",
        "0.5 -1.25 3\n2 0.75 -4\n",
        "0,5 -1,25 3\n2 0,75 -4\n",
        "  0.5   -1.25  3  \n\n  2\t0.75  -4\n".replace("\t", " "),
        "# a .1D file\n#\n5e-1 -125e-2 3.0\n+2 .75 -4.\n",
        '"0.5","-1.25","3"\n"2","0.75","-4"\n',
        '"0,5","-1,25","3"\n"2","0,75","-4"\n',
        "a,b,c\n0.5,-1.25,3\n2,0.75,-4\n",
        '"a, left";b;c\n0,5;-1,25;3\n2;0,75;-4\n',
        ",a,b,c\nx,0.5,-1.25,3\ny,2,0.75,-4\n",
        ",0,1,2\n0,0.5,-1.25,3\n1,2,0.75,-4\n",
        '"","V1","V2","V3"\n"1",0.5,-1.25,3\n"2",2,0.75,-4\n',
        "a b c\n1 0.5 -1.25 3\n2 2 0.75 -4\n",
        "0,1,2\n0.5,-1.25,3\n2,0.75,-4\n",
        "1\t2\t3\n0.5\t-1.25\t3\n2\t0.75\t-4\n",
        "left,0.5,-1.25,3\nright,2,0.75,-4\n",
        "name,a,b,c\nleft,0.5,-1.25,3\nright,2,0.75,-4\n",
    ],
    ids=[
        "CSV", "no end of line", "spaces and CRLF", "semicolons", "semicolons and decimal commas", "tabs",
        "tabs and decimal commas", "spaces", "spaces and decimal commas", "columns aligned", ".1D with comments",
        "quotes", "quotes and decimal commas", "header", "header with a comma in a name", "corner", "data frame",
        "as R's write.csv", "as R's write.table", "counting from 0", "counting from 1", "row names alone", "row names",
    ],
)  # fmt: skip
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_what_is_unambiguous_is_read(text: str, mark: bytes) -> None:
    table = read_text_table(mark + text.encode())
    np.testing.assert_array_equal(table.values, np.array(EXPECTED), strict=True)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_what_spreadsheets_call_unicode_is_read(encoding: str) -> None:
    table = read_text_table("größe\tb\tc\n0,5\t-1,25\t3\n2\t0,75\t-4\n".encode(encoding))
    assert table.names == ("größe", "b", "c")
    np.testing.assert_array_equal(table.values, EXPECTED)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1,2\n3,4\n", ()),
        ("a, b\n1,2\n3,4\n", ("a", "b")),
        (",a,b\nx,1,2\n", ("a", "b")),
        ("name,a,b\nx,1,2\n", ("a", "b")),
        ("a b\nx 1 2\n", ("a", "b")),
        ("0,1,2\n4,5,6\n", ()),
        (",0,1,2\nx,4,5,6\n", ()),
    ],
)
def test_names_are_those_of_the_header(text: str, names: tuple[str, ...]) -> None:
    assert read_text_table(text.encode()).names == names


def test_numbers_that_happen_to_count_are_no_header_where_they_are_two() -> None:
    np.testing.assert_array_equal(read_text_table(b"0,1\n1,0\n").values, [[0, 1], [1, 0]])


def test_numbers_come_back_to_the_bit() -> None:
    values = np.random.default_rng(0).standard_normal((7, 5)) * 10.0 ** np.arange(-2, 3)
    text = "\n".join(",".join(map(repr, row)) for row in values.tolist())
    np.testing.assert_array_equal(read_text_table(text.encode()).values, values)


@pytest.mark.parametrize("cell", ["nan", "NaN", "inf", "-Infinity"])
def test_what_is_not_finite_is_left_to_whoever_knows_the_regions(cell: str) -> None:
    assert not np.isfinite(read_text_table(f"1,2\n3,{cell}\n".encode()).values[1, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table has no rows"),
        ("# only a comment\n\n", "the table has no rows"),
        ("a,b,c\n", "has a header and no rows"),
        ("1,2,3\n4,NA,6\n", "line 2, column 2 of the table is 'NA'"),
        ("# x\n\n1,2,3\n4,,6\n", "line 4, column 2 of the table is empty"),
        ("1,2,4\n4,5,6,\n", "line 2 of the table has 4 numbers and line 1 has 3"),
        ("1,2,x\n4,5,6\n", "line 1, column 3 of the table is 'x'"),
        ("1.234,5;2\n3;4\n", "line 1, column 1 of the table is '1.234,5'"),
        ("1;2\n3;4,5,6\n", "line 2, column 2 of the table is '4,5,6'"),
        ("a,b\n1,2,3,4\n", "the header of the table has 2 names and line 2 has 4 numbers"),
        ('1,"2\n3,"4\n', "quotes that do not close"),
        ("x" * 500, "has a header and no rows"),
        (f"1,{'x' * 500}\n", f"column 2 of the table is '{'x' * 40}'"),
        ("größe,1\n1,2\n".encode("latin-1"), "neither text in UTF-8"),
        (b"\xff\xfe1", "neither text in UTF-8"),
        (bytes(range(128, 256)), "neither text in UTF-8"),
    ],
)
def test_what_is_no_table_is_refused_with_its_place(text: str | bytes, message: str) -> None:
    assert message in refusal(text)


def test_one_cell_however_long_costs_little() -> None:
    start = time.thread_time()
    assert np.isinf(read_text_table(b"1," + b"9" * 1_000_000).values[0, 1])
    assert read_text_table(b"1,0." + b"3" * 1_000_000).values[0, 1] == pytest.approx(1 / 3)
    refusal('"' * 1_000_001)
    refusal("1 " * 500_000 + "x")
    assert time.thread_time() - start < 2


def test_damaged_tables_give_numbers_or_invalid_input() -> None:
    rng = random.Random(5)
    seeds = [
        b"0.5,-1.25,3\n2,0.75,-4\n1,1,1\n",
        b'\xef\xbb\xbf"a";b;c\r\n0,5;-1,25;3\r\n2;0,75;-4\r\n',
        "a\tb\n0,5\t3\n2\t0,75\n".encode("utf-16"),
        b"# 1D\n 1 2 3\n 4 5 6\n",
    ]
    outcomes = set()
    for _ in range(3000):
        body = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 2, 5])):
            place = rng.randrange(len(body) + 1)
            body[place : place + rng.randrange(3)] = rng.choice(
                [b"", b",", b";", b"\n", b'"', b"#", b"x", b"1", b"\0", b"\xff"]
            )
        try:
            table = read_text_table(bytes(body))
        except InvalidInput:
            outcomes.add("refused")
        else:
            assert table.values.ndim == 2
            assert table.values.dtype == np.float64
            assert len(table.names) in (0, table.values.shape[1])
            outcomes.add("read")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "body",
    [
        b"1\n" * 5_000_000,
        b"\n" * 10_000_000 + b"1",
        b"\x1c" * 10_000_000 + b"1",
        b"#\r\n" * 3_000_000 + b"1",
        b"1," * 5_000_000,
        b";" * 10_000_000,
        b"1 " * 5_000_000,
        b"1\t1\n" * 90_000 + b"1\t" * 4_000_000,
        ("1," * 5_000_000).encode("utf-16"),
        ("1\u2003" * 5_000_000).encode(),
    ],
    ids=[
        "rows",
        "empty lines",
        "other ends",
        "comments",
        "one row",
        "empty cells",
        "blanks",
        "tabs",
        "UTF-16",
        "wide blanks",
    ],
)
def test_a_table_of_millions_of_parts_is_refused_quickly(body: bytes) -> None:
    started = time.thread_time()
    assert "the table has more than 100000 lines or 4000000 cells" in refusal(body)
    assert time.thread_time() - started < 0.5  # reading it takes seconds and gigabytes


def test_tables_up_to_the_limits_are_read() -> None:
    assert read_text_table(b"1 2\r\n" * 99_000).values.shape == (99_000, 2)
    assert read_text_table((b" " * 50 + b"1") * 20_000).values.shape == (1, 20_000)  # blanks are no cells


def test_a_table_in_utf_16_may_have_as_many_characters_as_in_utf_8() -> None:
    text = "0.123456789,1.5\n" * 90_000 + "1,2" + "0" * 4_000_000
    assert read_text_table(text.encode("utf-16")).values.shape == (90_001, 2)


@pytest.mark.parametrize("body", [b"PK\3\4" + bytes(100), b"MATLAB 5.0 MAT-file" + bytes(100), bytes(10)])
def test_what_is_no_text_is_told_so(body: bytes) -> None:
    assert "neither text in UTF-8 nor" in refusal(body)


def test_an_underscore_is_no_part_of_a_number() -> None:
    assert "column 2 of the table is '1_0'" in refusal("1,1_0,2\n1,2,3\n3,4,5\n")
    assert read_text_table(b"1_0,1_1\n1,2\n").names == ("1_0", "1_1")
