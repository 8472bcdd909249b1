"""Logs are events with fields, one JSON object a line.

Owns the line's shape. Which logger, level and fields is the business of whoever has something to
say; nobody logs prompt or answer text.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping

LogValue = str | int | float | bool | None


def log_event(
    logger: logging.Logger,
    event: str,
    fields: Mapping[str, LogValue],
    level: int = logging.INFO,
) -> None:
    """Log an event with fields."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, logger, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """For people: the time, the logger, the event, then name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, and a traceback below it."""
        fields = "".join(
            f" {name}={value}" for name, value in getattr(record, "fields", {}).items()
        )
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower()} {record.name}: {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure_logging(level: str) -> None:
    """Send this process's log to stderr: text on a terminal, JSON lines elsewhere."""
    handler = logging.StreamHandler(sys.stderr)
    # A child's stderr is its supervisor's pipe; the supervisor says whether it has a terminal.
    is_terminal = sys.stderr.isatty() or os.environ.get("RILLGATE_SUPERVISED") == "terminal"
    handler.setFormatter(TextFormatter() if is_terminal else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
