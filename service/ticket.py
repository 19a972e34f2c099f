"""A ticket: one accepted request, from admission to answer.

Its future lives on the event loop. Other threads read whether somebody still waits for it, and leave their times here.
"""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.tracing import Trace


@dataclass(slots=True, eq=False)
class Ticket:
    """One accepted request.

    Attributes:
        future: the answer, on the event loop.
        deadline: time of the batcher's clock after which nobody wants the answer.
        is_dead: nobody waits for it, so work on it is dropped.
        times: stage → seconds, for the log.
        request_id: for the log.
        trace: gets a span for each stage, where there are traces.
    """

    future: "asyncio.Future[Any]"
    deadline: float
    is_dead: bool = False
    times: dict[str, float] = field(default_factory=dict)
    request_id: str = ""
    trace: "Trace | None" = None

    def is_wanted(self, now: float) -> bool:
        """Whether somebody still waits for the answer at this time of the batcher's clock."""
        return not self.is_dead and self.deadline > now
