"""What waits in a socket is bounded in messages, and in bytes."""

from __future__ import annotations

import threading
import time

import pytest

from steering.sources import zmq_socket

zmq = pytest.importorskip("zmq")


@pytest.mark.parametrize(("size", "most"), [(100_000, 400), (100, 3000)])
def test_fewer_messages_wait_where_they_are_large(monkeypatch, size, most):
    monkeypatch.setattr(zmq_socket, "MOST_BYTES", 20_000_000)
    context, stopped, sent = zmq.Context(), threading.Event(), 0
    socket = context.socket(zmq.PUSH)
    socket.set(zmq.SNDHWM, 1)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    messages = zmq_socket.received(f"tcp://127.0.0.1:{port}", "pull", 2000, stopped)
    assert next(messages) is None  # it is connected
    socket.send(bytes(size))
    assert next(message for message in messages if message is not None).parts == (bytes(size),)
    end = time.monotonic() + 30
    while sent < 2000 and socket.poll(500, zmq.POLLOUT) and time.monotonic() < end:
        socket.send(bytes(size))
        sent += 1
    stopped.set()
    messages.close()
    context.destroy(linger=0)
    assert sent < most
    assert sent >= min(200, most)
