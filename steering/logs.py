"""What is logged, as lines for people or, for other programs, as a JSON object a line: STEERING_LOG says which."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

KINDS = ("text", "json")
VARIABLE = "STEERING_LOG"


def chosen() -> str:
    """One of KINDS, as the environment has it. Raises ValueError for anything else."""
    kind = os.environ.get(VARIABLE, KINDS[0])
    if kind not in KINDS:
        raise ValueError(f"found {VARIABLE}={kind}, expected one of {', '.join(KINDS)}")
    return kind


def begin(kind: str) -> None:
    """Log on standard error from now on, in this process; warnings, and of `steering.clusters` what it waits for."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(levelname)s: %(message)s", force=kind == "json")
    if kind == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JSONLines())
    logging.getLogger("steering.clusters").setLevel(logging.INFO)


class JSONLines(logging.Formatter):
    """A JSON object a line: time (UTC, ISO 8601), level, logger, message, process; error and traceback where one is
    logged."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields |= {"error": f"{type(error).__name__}: {error}", "traceback": self.formatException(record.exc_info)}
        return json.dumps(fields, ensure_ascii=False)
