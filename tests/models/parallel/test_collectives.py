from collections.abc import Callable

import pytest

from tests.models.parallel import laws
from tests.models.parallel.ranks import Ranks

TIMEOUT_SECONDS = 1.5
MARGIN_SECONDS = 1.5  # for a busy machine


@pytest.mark.parametrize(
    ("how", "what"), [("killed", "dense"), ("killed", "clustered"), ("late", "dense"), ("late", "clustered")]
)
def test_a_lost_or_late_rank_is_an_error_on_all_ranks_in_time(
    how: str, what: str, fresh_ranks: Callable[[int], Ranks]
) -> None:
    *others, last = fresh_ranks(4).run(laws.lose_a_rank, how, what, TIMEOUT_SECONDS)
    assert (last is None) == (how == "killed")
    for said, seconds in others if last is None else [*others, last]:
        assert f"later than {TIMEOUT_SECONDS} s" in said
        assert seconds < TIMEOUT_SECONDS + MARGIN_SECONDS
