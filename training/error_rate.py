"""Error rates of recognised texts: edits that turn what was said into what was found, per word or character said."""

from collections.abc import Sequence
from typing import NamedTuple, Self


class ErrorCount(NamedTuple):
    """Errors, and out of how many.

    Attributes:
        num_errors: words (or characters) replaced, left out and put in.
        num_said: words (or characters) of the true text.
    """

    num_errors: int = 0
    num_said: int = 0

    def __add__(self, other: Self) -> "ErrorCount":  # type: ignore[override] # of counts, not of tuples
        """Add up two counts."""
        return ErrorCount(self.num_errors + other.num_errors, self.num_said + other.num_said)

    @property
    def rate(self) -> float:
        """Errors per word said; above 1 if much was put in."""
        return self.num_errors / max(1, self.num_said)


def count_errors(said: Sequence[str], found: Sequence[str]) -> ErrorCount:
    """Count the fewest edits between two sequences (Levenshtein 1966)."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(said, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return ErrorCount(row[-1], len(said))
