"""Workers log as the driver does, where that logs a JSON object a line."""

from __future__ import annotations

from typing import Any

from distributed import Client, WorkerPlugin

from steering.logs import begin, chosen


class _Logs(WorkerPlugin):
    """How a worker's own processes log."""

    name = "steering-logs"

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def setup(self, worker: Any) -> None:
        begin(self._kind)


def share_logs(client: Client) -> None:
    """Have all workers of a cluster, those to come too, log as this process does."""
    if chosen() == "json":
        client.register_plugin(_Logs("json"))
