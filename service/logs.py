"""Logs: one JSON object a line on standard output; payloads are never logged.

How many lines there are is bounded where strangers could cause as many as they like: see `Throttle`.
"""

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

ACCESS = logging.getLogger("service.access")

LINES_PER_SECOND = 20.0  # of one kind, in the long run
BURST = 100.0  # lines of one kind at once

# Version, trace, parent span, flags; zeros alone are not valid: W3C Trace Context, section 3.2.2.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_encode = json.JSONEncoder(default=str).encode  # made once: json.dumps makes an encoder a line


def log_request(fields: Mapping[str, Any]) -> None:
    """Log a finished request.

    Differs: from `ACCESS.info` in time alone: the record is made without searching the stack for the caller.
    """
    if ACCESS.isEnabledFor(logging.INFO):
        record = logging.LogRecord(ACCESS.name, logging.INFO, "", 0, "request", None, None)
        record.fields = fields
        ACCESS.handle(record)


def find_trace_id(traceparent: str) -> str | None:
    """Read which trace a client's request belongs to; None where the header is not well-formed."""
    match = _TRACEPARENT.fullmatch(traceparent)
    return match[1] if match else None


class JsonFormatter(logging.Formatter):
    """A record as one JSON line: time, level, logger, message, the fields of `extra={"fields": …}`, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _encode(line)


class Throttle(logging.Filter):
    """Lets only so many lines of refused requests, warnings and errors through; requests that went well all pass.

    Each logger has its own share for each level, so that a flood of refusals hides no failure of a model. The next line
    that passes says in `suppressed` how many of its kind did not.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, int], _Bucket] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        fields = getattr(record, "fields", {})
        if record.levelno < logging.WARNING and fields.get("outcome", "ok") == "ok":
            return True
        with self._lock:
            bucket = self._buckets.setdefault((record.name, record.levelno), _Bucket(self._clock()))
            if not bucket.take(self._clock()):
                return False
            suppressed, bucket.num_suppressed = bucket.num_suppressed, 0
        if suppressed:
            record.fields = {**fields, "suppressed": suppressed}
        return True


class _Bucket:
    """What is left of a share: it fills steadily, and a line takes one."""

    def __init__(self, now: float) -> None:
        self._left, self._since = BURST, now
        self.num_suppressed = 0

    def take(self, now: float) -> bool:
        self._left = min(BURST, self._left + (now - self._since) * LINES_PER_SECOND)
        self._since = now
        if self._left < 1:
            self.num_suppressed += 1
            return False
        self._left -= 1
        return True


def configure_logs(level: str) -> None:
    """Send every logger's records of this level and above to standard output as JSON lines."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(Throttle())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Facts that no line shows: finding them costs more than writing the line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
