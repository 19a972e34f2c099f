"""Logs: one JSON object a line on standard output; payloads are never logged."""

import json
import logging
import sys
from datetime import UTC, datetime

ACCESS = logging.getLogger("service.access")


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
        return json.dumps(line, default=str)


def configure_logs(level: str) -> None:
    """Send every logger's records of this level and above to standard output as JSON lines."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
