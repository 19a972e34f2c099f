"""Tables of numbers as text: CSV, .1D and whatever else spreadsheets and neuroimaging tools write.

Cells are separated by commas, semicolons, tabs or spaces. A byte order mark, comments after `#`, empty lines, quotes, a
header and a first column of row names are recognised where there is no doubt, and so are decimal commas: a comma within
a cell is one. Where a table can be read in two ways, or a cell is no number, it is refused.
"""

import codecs
import csv
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import InvalidInput

Values = npt.NDArray[np.float64]

_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
Line = tuple[int, list[str]]  # number of the line in the file, its cells

# However short it is, a line takes some 300 bytes and 1 µs, a cell 60 bytes and 0.3 µs; 20 MB hold twenty million.
_MAX_LINES, _MAX_CELLS = 100_000, 4_000_000
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # of str.splitlines
_SEPARATORS = b",;\t"
# Of str.split, beyond ASCII; as UTF-8 they look like letters.
_WIDE_BLANKS = "\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_IS_WITHIN_CELL = bytes(byte > ord(" ") and byte not in _SEPARATORS for byte in range(256))  # by byte


class TextTable(NamedTuple):
    """A table and what stood above it.

    Attributes:
        values: (rows, columns); NaN and infinity as they came.
        names: of the columns; empty where there is no header, or one that only counts.
    """

    values: Values
    names: tuple[str, ...]


def read_text_table(body: bytes) -> TextTable:
    """Read a table.

    Raises: InvalidInput.
    """
    text = _decode(body)
    # Two characters end a line of Windows.
    if sum(map(text.count, _LINE_ENDS)) > 2 * _MAX_LINES or _count_cells(text) > _MAX_CELLS:
        raise InvalidInput(
            f"the table has more than {_MAX_LINES} lines or {_MAX_CELLS} cells; a line per region, or per frame of a "
            "time series, was expected; send one subject's table, or a large one as .npy"
        )
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise InvalidInput("the table has no rows; lines of numbers were expected; send the file itself as the body")
    separator = _find_separator(lines[-1][1])  # the first line may be a header
    rows = [(number, _split(line, separator)) for number, line in lines]
    header = rows.pop(0)[1] if _is_header(rows[0][1]) else []
    if not rows:
        raise InvalidInput("the table has a header and no rows; lines of numbers were expected; send the whole file")
    if _has_row_names(header, rows):
        header = header[1:] if len(header) == len(rows[0][1]) else header
        rows = [(number, cells[1:]) for number, cells in rows]
    _check_lengths(header, rows)
    names = () if _is_counting(header) else tuple(cell.strip() for cell in header)
    return TextTable(np.array([_to_floats(number, cells) for number, cells in rows], np.float64), names)


def _count_cells(text: str) -> int:
    """Count at least as many as there are, empty ones included."""
    encoded = text.encode()  # whatever it came in: in UTF-16, every other byte of a number is no part of a cell
    is_within = np.frombuffer(encoded.translate(_IS_WITHIN_CELL), np.uint8)
    num_blanks = 0 if text.isascii() else sum(map(text.count, _WIDE_BLANKS))
    num_starts = int(np.count_nonzero(is_within[1:] > is_within[:-1])) + 1 + num_blanks
    return max(num_starts, sum(map(encoded.count, _SEPARATORS)))


def _decode(body: bytes) -> str:
    encoding = next((encoding for mark, encoding in _ENCODINGS.items() if body.startswith(mark)), "utf-8")
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise _no_text() from error
    if "\0" in text:  # archives, MATLAB files
        raise _no_text()
    return text


def _no_text() -> InvalidInput:
    return InvalidInput(
        "the body is neither text in UTF-8 nor a .npy file; a table of numbers was expected; save it as CSV in UTF-8, "
        "or with numpy.save"
    )


def _find_separator(line: str) -> str | None:
    """Tell what stands between the cells of a line of numbers; None is whitespace of any length."""
    bare = re.sub(r'"[^"]*"', "0", line).strip()
    if ";" in bare:
        return ";"
    if "\t" in bare:
        return "\t"
    # Where blanks alone part two numbers, a comma can only be within one.
    return "," if "," in bare and not re.search(r"[^\s,]\s+[^\s,]", bare) else None


def _split(line: str, separator: str | None) -> list[str]:
    if separator is None:
        return line.replace('"', "").split()
    if '"' not in line:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise InvalidInput(
            "a line of the table has quotes that do not close; numbers need no quotes; save the table without them"
        ) from error


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return "_" not in cell  # Python reads 1_0 as 10


def _is_counting(cells: Sequence[str]) -> bool:
    """Whether cells are 0, 1, 2 … or 1, 2, 3 …, as data frames without names write above their columns."""
    named = [cell.strip() for cell in (cells[1:] if cells and not cells[0].strip() else cells)]
    return len(named) > 2 and any(named == [str(start + n) for n in range(len(named))] for start in (0, 1))


def _is_header(cells: list[str]) -> bool:
    # A line of which only some cells are numbers is no header but a damaged line.
    return not any(_is_number(cell) for cell in cells) or _is_counting(cells)


def _has_row_names(header: list[str], rows: list[Line]) -> bool:
    has_corner = bool(header) and (not header[0].strip() or len(header) == len(rows[0][1]) - 1)
    return len(rows[0][1]) > 1 and (has_corner or not any(_is_number(cells[0]) for _, cells in rows))


def _check_lengths(header: list[str], rows: list[Line]) -> None:
    num_columns = len(rows[0][1])
    if header and len(header) != num_columns:
        raise InvalidInput(
            f"the header of the table has {len(header)} names and line {rows[0][0]} has {num_columns} numbers; as many "
            "were expected; save the table without a header"
        )
    for number, cells in rows:
        if len(cells) != num_columns:
            raise InvalidInput(
                f"line {number} of the table has {len(cells)} numbers and line {rows[0][0]} has {num_columns}; as many "
                "were expected in each; save the table anew, with commas or semicolons between the numbers"
            )


def _to_floats(number: int, cells: list[str]) -> list[float]:
    try:
        if "_" not in "".join(cells):
            return list(map(float, cells))
    except ValueError:
        pass
    return [_to_float(number, column, cell) for column, cell in enumerate(cells, 1)]


def _to_float(number: int, column: int, cell: str) -> float:
    text = cell.strip()
    if not _is_number(text):
        raise InvalidInput(
            f"line {number}, column {column} of the table is {repr(text[:40]) if text else 'empty'}; a number was "
            "expected; remove the text, or fill what is missing"
        )
    return float(text.replace(",", "."))
