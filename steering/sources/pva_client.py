"""A client of PV Access: the updates of a PV, and which of them it held before. Needs the extra `epics`."""

from __future__ import annotations

import contextlib
import queue
import time
from typing import Any, NamedTuple

CONNECT_S = 3.0
"""Seconds after which a PV that does not answer is waited for no more."""


class Update(NamedTuple):
    """What a PV sent."""

    value: Any
    held: bool
    """It is what the PV held when it was connected."""


class Updates:
    """The updates of a PV, through a queue of our own, which drops its oldest: their numbers are missing then."""

    def __init__(self, client: Any, pv: str, size: int, fields: str = "") -> None:
        """fields: names of those that are asked for; empty: all."""
        self._queue: queue.Queue[Update] = queue.Queue(size)
        self._connected = self._heard = False
        self._begins = True
        self._by = time.monotonic() + CONNECT_S
        request = f"record[queueSize={size}]field({fields})"
        self._subscription = client.monitor(pv, self._take, request=request, notify_disconnect=True)

    @property
    def listens(self) -> bool:
        """It was connected, or was not for so long that nobody should wait for it."""
        return self._heard or time.monotonic() > self._by

    def _take(self, value: Any) -> None:
        if isinstance(value, Exception):
            # It connects again by itself. The first only says that it is not connected yet, maybe late.
            self._connected, self._begins = self._connected and self._begins, False
            return
        update, self._connected = Update(value, held=not self._connected), True
        self._heard = True
        while True:
            try:
                return self._queue.put_nowait(update)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._queue.get_nowait()

    def next(self, wait_s: float) -> Update | None:
        """The next update, or None after so long without one."""
        try:
            return self._queue.get(wait_s > 0, wait_s or None)
        except queue.Empty:
            return None


def context(server: str) -> Any:
    """A client; its values are the structures as they come."""
    try:
        from p4p.client.thread import Context  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("EPICS needs p4p, which is not installed: pip install 'steering[epics]'") from error
    if not server:
        return Context("pva", nt=False)
    search = {"EPICS_PVA_NAME_SERVERS": server, "EPICS_PVA_ADDR_LIST": "", "EPICS_PVA_AUTO_ADDR_LIST": "NO"}
    return Context("pva", nt=False, conf=search, useenv=False)
