"""What the frames' stream has said of the scans that have begun."""

from __future__ import annotations

from typing import Any

from steering.sources.plan import Plan
from steering.sources.streams import Began


class BegunScans:
    """Their names and uids; of what else was said only that of the newest scan is kept, as a mask takes megabytes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.before = 0
        """Scans of this run before those that are received here."""
        self.header: dict[str, Any] = {}
        """Of the newest scan."""
        self._names: dict[int, str] = {}
        self._runs: dict[int, str] = {}

    def begin(self, scan: int, record: Began) -> Began:
        """A scan begins; returns what was said of it, with what is known of one that is joined in its middle."""
        if scan == 0:
            record, self.before = self._plan.first_scan(record)
        if record.name is not None:
            self._names[scan] = record.name
        self.header = dict(record.header)
        if "run" in record.header:
            self._runs[scan] = record.header["run"]
        return record

    def name(self, scan: int) -> str:
        """What a scan is called; one that has no name is numbered."""
        return self._names.get(scan, f"scan-{self.before + scan + 1}")

    @property
    def runs(self) -> dict[str, str]:
        """Uids of bluesky's runs, by the scan's name."""
        return {self.name(scan): uid for scan, uid in self._runs.items()}
