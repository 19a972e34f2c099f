"""Logs: one JSON object a line on standard output; payloads are never logged."""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

ACCESS = logging.getLogger("service.access")

_encode = json.JSONEncoder(default=str).encode  # made once: json.dumps makes an encoder a line


def log_request(fields: Mapping[str, Any]) -> None:
    """Log a finished request.

    Differs: from `ACCESS.info` in time alone: the record is made without searching the stack for the caller.
    """
    if ACCESS.isEnabledFor(logging.INFO):
        record = logging.LogRecord(ACCESS.name, logging.INFO, "", 0, "request", None, None)
        record.fields = fields
        ACCESS.handle(record)


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


def configure_logs(level: str) -> None:
    """Send every logger's records of this level and above to standard output as JSON lines."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Facts that no line shows: finding them costs more than writing the line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
