"""Receives from ZMQ sockets, for every protocol that speaks over them. Needs the extra `dectris`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from steering.sources.streams import Message

_BATCH = 256
"""Messages that are read before the caller may look around."""
MOST_BYTES, _LEAST = 2**31, 64
"""Most bytes of messages that wait, by the largest one so far; but so many messages may always wait."""


def zmq() -> Any:
    """The library pyzmq, imported late."""
    try:
        import zmq as library  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("ZMQ streams need pyzmq, which is not installed: pip install 'steering[dectris]'") from error
    return library


def received(address: str, kind: str, high_water: int, stopped: threading.Event) -> Iterator[Message | None]:
    """Messages as they come, None where there was none for 0.05 s. kind: pull or sub.

    high_water: messages that may wait before the sender has to, fewer where they are large.

    The socket connects again by itself where its peer returns. Raises ValueError for an address that ZMQ does not know.
    """
    library = zmq()
    if kind not in ("pull", "sub"):
        raise ValueError(f"found a socket of kind {kind!r}, expected pull or sub")
    context = library.Context()
    try:
        socket = context.socket(library.PULL if kind == "pull" else library.SUB)
        socket.set(library.LINGER, 0)
        socket.set(library.RCVHWM, high_water)
        if kind == "sub":
            socket.set(library.SUBSCRIBE, b"")
        try:
            socket.connect(address)
        except library.ZMQError as error:
            raise ValueError(f"found the address {address!r} ({error}), expected tcp://HOST:PORT") from error
        largest = MOST_BYTES // high_water
        while not stopped.is_set():
            if not socket.poll(50):
                yield None
                continue
            for _ in range(_BATCH):
                try:
                    parts = socket.recv_multipart(library.NOBLOCK)
                except library.Again:
                    break
                if (size := sum(map(len, parts))) > largest:
                    largest = size
                    socket.set(library.RCVHWM, min(high_water, max(_LEAST, MOST_BYTES // size)))
                yield Message(tuple(parts))
    finally:
        context.destroy(linger=0)
