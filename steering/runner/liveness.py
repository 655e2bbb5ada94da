"""Whether a run is alive, how it ended, and where it can be reached: from its folder alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from steering.files import read_json
from steering.runner.folder import RunFolder


def whereabouts(folder: RunFolder) -> dict[str, Any]:
    """What scheduler.json says: how to reach the run's cluster and its runner; empty before the campaign has begun."""
    try:
        return read_json(folder.path / "scheduler.json")
    except FileNotFoundError:
        return {}


def gone(folder: RunFolder) -> bool:
    """True for a run whose summary says running while nothing of it is alive: neither who started it nor its runner.

    Processes of this machine are looked up; one of another machine counts as alive while the scheduler can be reached,
    and where only that machine could reach it, see `elsewhere`.
    """
    summary = folder.summary()
    if summary.get("status") != "running":
        return False
    where = whereabouts(folder)
    known = [one for one in (summary, where) if "pid" in one and "host" in one]
    if not known or (len(known) == 1 and known[0]["host"] != socket.gethostname()):
        return False  # nobody knows
    driver = summary.get("host") == socket.gethostname() and _alive(summary["pid"])
    return not driver and not there(where)


def there(where: Mapping[str, Any]) -> bool:
    """Whether the runner that scheduler.json tells of is alive: its process where that is on this machine, else whether
    its cluster can be reached. Where nobody here can know, it is."""
    if where.get("host") == socket.gethostname():
        return _alive(where["pid"])
    return elsewhere(where) != "" or ("address" in where and _reached(where["address"]))


def elsewhere(where: Mapping[str, Any]) -> str:
    """The machine of a runner, of which nobody here can know whether it is alive: it is another one, and its cluster
    listens to that machine alone. Empty for all others."""
    host, at = str(where.get("host", "")), urlsplit(str(where.get("address", ""))).hostname or ""
    alone = at in ("localhost", "::1") or at.startswith("127.")
    return host if alone and host != socket.gethostname() else ""


def standing(folder: RunFolder) -> dict[str, Any]:
    """The run's summary; for one that is gone without a word, with that as `lost`, and for one that goes on elsewhere
    with that machine as `elsewhere`."""
    summary = folder.summary()
    if summary.get("status") == "running" and (machine := elsewhere(whereabouts(folder))):
        summary["elsewhere"] = machine
    if gone(folder):
        summary["lost"] = (
            f"ended without a message: its process ({summary.get('pid')}) was killed, or the machine went down"
        )
    return summary


def ended(folder: RunFolder) -> str:
    """How a run ended, in words that follow `a run that ...`."""
    summary = standing(folder)
    if "lost" in summary:
        return str(summary["lost"])
    status, reason = summary.get("status", "running"), summary.get("reason")
    goes_on = f"goes on (on {summary['elsewhere']}: ask there)" if "elsewhere" in summary else "goes on"
    return f"{goes_on if status == 'running' else status}{f': {reason}' if reason else ''}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # what nobody has waited for yet is dead all the same
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state != "Z"


def _reached(address: str, timeout: float = 2.0) -> bool:
    parts = urlsplit(address)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=timeout):
            return True
    except OSError:
        return False
