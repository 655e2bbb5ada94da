"""The log of a run as it grows: each line once."""

from __future__ import annotations

import json
from typing import Any

from steering.files import own_file
from steering.runner.folder import RunFolder

_MOST = 2**24
"""Bytes that are read at once."""


class Tail:
    """Reads what was added to events.jsonl since the last time."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._at = 0
        self._rest = b""

    def lines(self) -> list[dict[str, Any]]:
        """Whole new lines, up to 16 MiB of them; empty where there are none."""
        path = self._folder.path / "events.jsonl"
        try:
            with own_file(path, self._folder.path).open("rb") as log:
                log.seek(self._at)
                data = log.read(_MOST)
        except FileNotFoundError:
            return []
        self._at += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        found = []
        for line in whole:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):  # cut short by a killed process
                continue
            if isinstance(event, dict):
                found.append(event)
        return found
