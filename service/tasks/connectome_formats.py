"""Files of brain connectivity: JSON, NumPy's .npy or a text table → numbers, and what the file says they are.

The first bytes tell the format. Whatever they are, nothing in them is run and nothing is allocated that is larger than
a small multiple of them: .npy is read here rather than by `numpy.load`, as its header is a Python expression and may
announce any size.
"""

import math
import re
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from service.errors import InvalidInput
from service.sample import AnyArray
from service.tasks.number_tables import read_text_table

JSON = "application/json"
CONNECTOME_MEDIA_TYPES = frozenset({JSON, "text/csv", "text/plain", "application/x-npy"})

Kind = Literal["connectivity", "time_series"]

_KINDS: tuple[Kind, ...] = ("connectivity", "time_series")
_EXPECTED = 'an object with either "connectivity" or "time_series", rows of numbers, was expected'
_EXAMPLE = 'send {"connectivity": [[0, 1], [1, 0]]} with as many rows as there are regions'

# A list, an object or a text costs some 60 bytes of memory and 0.3 µs in which no other thread runs; 20 MB can hold
# seven million. Numbers cost a tenth of it.
_MAX_ROWS, _MAX_TEXTS = 100_000, 1_000

_NPY = b"\x93NUMPY"
_MAX_NPY_HEADER = 10_000  # as numpy.load; one of two dimensions has about 100 bytes
_NPY_FIELDS = {
    "descr": re.compile(rb"""['"]descr['"]\s*:\s*(['"][^'"]*['"]|\[)"""),
    "fortran_order": re.compile(rb"""['"]fortran_order['"]\s*:\s*(True|False)"""),
    "shape": re.compile(rb"""['"]shape['"]\s*:\s*\(([\d\s,]*)\)"""),
}
_NPY_NUMBER = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f(?:2|4|8))")


class Table(NamedTuple):
    """What a file holds.

    Attributes:
        values: float64, of any shape.
        kind: what the file calls it; None where only its shape can tell.
        names: of the columns, empty where the file has none.
    """

    values: npt.NDArray[np.float64]
    kind: Kind | None
    names: tuple[str, ...]


def read_connectome(body: bytes, media_type: str) -> Table:
    """Read a file.

    Args:
        body: the file.
        media_type: as the client named it. It decides only where the first bytes leave it open, between a damaged JSON
            and a table.
    Raises: InvalidInput.
    """
    if not body.strip():
        raise InvalidInput(
            "the body is empty; a connectivity or a time series as JSON, CSV, text or .npy was expected; send the file "
            "as the body"
        )
    if body.startswith(_NPY):
        return Table(_read_npy(body).astype(np.float64), None, ())
    if media_type == JSON or body.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return _read_json(body)
    values, names = read_text_table(body)
    return Table(values, None, names)


def _read_json(body: bytes) -> Table:
    if body.count(b"[") > _MAX_ROWS or max(body.count(b"{"), body.count(b'"')) > _MAX_TEXTS:
        raise InvalidInput(
            f"the JSON has more than {_MAX_ROWS} rows, or more than {_MAX_TEXTS} texts or objects; {_EXPECTED}; "
            f"{_EXAMPLE}"
        )
    try:
        fields = from_json(body.removeprefix(b"\xef\xbb\xbf"))  # a byte order mark
    except ValueError as error:
        raise InvalidInput(f"the JSON cannot be read: {error}; {_EXPECTED}; {_EXAMPLE}") from error
    if not isinstance(fields, dict):
        raise InvalidInput(f"the JSON is no object; {_EXPECTED}; {_EXAMPLE}")
    if len(fields) != 1 or not fields.keys() <= set(_KINDS):
        names = ", ".join(sorted(str(name)[:40] for name in fields)[:8]) or "nothing"
        raise InvalidInput(f"the JSON has {names}; {_EXPECTED}; {_EXAMPLE}")
    (kind,) = (kind for kind in _KINDS if kind in fields)
    if body.count(b'"') != 2:  # any others belong to a text, an object or a repeated name
        raise InvalidInput(
            f'"{kind}" comes twice, or holds texts or objects; it was expected once and to hold rows of numbers; '
            "write numbers without quotes, and send one matrix"
        )
    try:
        values = np.array(fields[kind], np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidInput(
            f'"{kind}" is no table of numbers, or one that is not finite; rows of equal length were expected; fill or '
            "remove what is missing"
        ) from error
    return Table(values, kind, ())


def _read_npy(body: bytes) -> AnyArray:
    """View the array of a .npy file, in versions 1 to 3 of its format.

    Source: numpy.lib.format. Differs: two dimensions, numbers only, and nothing may follow them.
    """
    size_bytes = 2 if body[6:7] == b"\x01" else 4  # of the header's length
    start = 8 + size_bytes
    end = start + int.from_bytes(body[8:start], "little")
    found = {name: pattern.search(body[start:end]) for name, pattern in _NPY_FIELDS.items()}
    if body[6:7] not in (b"\x01", b"\x02", b"\x03") or not end - start <= _MAX_NPY_HEADER or not all(found.values()):
        raise InvalidInput(
            "the .npy file has a header that cannot be read; one as numpy.save writes it was expected; save the array "
            "with numpy.save"
        )
    descr, order, shape = (match[1].decode("latin-1") for match in found.values() if match is not None)
    descr, sizes = descr.strip("'\""), _read_shape(shape)
    if not _NPY_NUMBER.fullmatch(descr):
        raise InvalidInput(
            f"the .npy file holds elements of type {descr[:40]}; real numbers of at most 64 bits were expected, as "
            "objects are never unpickled; save array.astype(numpy.float32)"
        )
    dtype = np.dtype(descr)
    if len(sizes) != 2:
        raise InvalidInput(
            f"the .npy file holds an array of shape ({shape[:40]}); two dimensions, neither of them 0, were expected; "
            "save one subject's matrix"
        )
    if math.prod(sizes) * dtype.itemsize != len(body) - end:
        raise InvalidInput(
            f"the .npy file announces {sizes[0]} x {sizes[1]} numbers of {dtype.itemsize} bytes and has "
            f"{len(body) - end} bytes of them; as many as announced were expected; send the whole file"
        )
    return np.frombuffer(body, dtype, offset=end).reshape(sizes, order="F" if order == "True" else "C")


def _read_shape(shape: str) -> list[int]:
    """The sizes, none where a size is 0 or no number that an array could have."""
    sizes = [size.strip() for size in shape.split(",") if size.strip()]
    is_usual = all(size.isdecimal() and len(size) <= 10 and int(size) for size in sizes)
    return [int(size) for size in sizes] if is_usual else []
