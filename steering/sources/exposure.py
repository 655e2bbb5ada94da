"""Waits for what takes as long as an exposure, and for no longer than somebody wants to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_thread(call: Callable[[], None]) -> Future[None]:
    """A call that may take as long as an exposure, in a thread that ends with the process."""
    future: Future[None] = Future()

    def work() -> None:
        try:
            call()
            future.set_result(None)
        except Exception as error:  # the boundary of this thread
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def unless_stopped(call: Callable[[], None], stopped: threading.Event, look_s: float = 0.05) -> None:
    """Wait for such a call until `stopped` is set, and then leave it to itself. Raises what it raises."""
    running = in_thread(call)
    while not stopped.is_set():
        try:
            return running.result(look_s)
        except TimeoutError:  # ours, or the call's own
            if running.done():
                raise
