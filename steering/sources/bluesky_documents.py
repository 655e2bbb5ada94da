"""Documents of bluesky as they come, and as messages that can be recorded, with the rows of files that they name.

They come by ZMQ, as bluesky.callbacks.zmq publishes them, or are played from a file with a JSON array [name, document]
in each line, as bluesky's JSONLinesWriter leaves it. bluesky pickles what it publishes unless it is given a serializer;
pickles are refused: use `Publisher(..., serializer=steering.sources.bluesky_plan.to_json)`.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steering.sources.streams import Decoder, Message, Record
from steering.sources.zmq_socket import received

_HIGH_WATER, _LINE = 100_000, 2**26

Document = tuple[str, Mapping[str, Any]]
"""Its name, and itself."""
Rows = Callable[[Any, int], Iterable[NDArray]]
"""Reads the rows (row, ...) that documents name, with so many dimensions each, some at once."""


class Refused(ValueError):
    """With words for the user."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where documents come from."""

    place: str
    """HOST:PORT, or the path of a file, with a slash or without a colon."""
    patience_s: float = 10.0
    """Seconds that a row may be missing from its file after a document has said that it is there."""

    def come(self, stopped: threading.Event) -> Iterator[Document | str | None]:
        """(name, document); None where none came for a moment; words for what is no document."""
        return (None if message is None else self.read(message) for message in self.messages(stopped))

    def messages(self, stopped: threading.Event) -> Iterator[Message | None]:
        """The documents as they came."""
        if not self._are_lines:
            yield from received(f"tcp://{self.place}", "sub", _HIGH_WATER, stopped)
            return
        with Path(self.place).open("rb") as file:
            while not stopped.is_set() and (line := file.readline(_LINE)):
                yield Message((line,))

    def read(self, message: Message) -> Document | str:
        """The document of a message; words for what is none."""
        if self._are_lines:
            return _of_line(message.parts[0])
        try:
            _, name, text = message.parts[0].split(b" ", 2)
            return _document(name.decode(), text)
        except ValueError as error:
            return str(error) if isinstance(error, Refused) else "a message that is no document of bluesky"

    def part(self, message: Message, first: int, last: int) -> bytes:
        """Of a message with a stream_datum that names many rows, one that names only these of them."""
        text = message.parts[0] if self._are_lines else message.parts[0].split(b" ", 2)[2]
        whole = json.loads(text)
        document = whole[1] if self._are_lines else whole
        for each in ("indices", "seq_nums"):
            start = document[each]["start"]
            document[each] = {"start": start + first, "stop": start + last}
        return message.parts[0].removesuffix(text) + json.dumps(whole).encode()

    @property
    def _are_lines(self) -> bool:
        return "/" in self.place or ":" not in self.place


class DocumentStream(Protocol):
    """A stream that documents make."""

    @property
    def documents(self) -> Documents:
        """Where they come from."""

    def said(self, documents: Iterator[Document | str | None], rows: Rows) -> Iterator[Record | None]:
        """Its records; None where there was no document."""


def messages_of(stream: DocumentStream, rows: Rows, stopped: threading.Event) -> Iterator[Message | None]:
    """The documents of a stream, each with the rows that were read for it; at last one that says that it is over.

    The documents are decoded meanwhile, to know of the rows. Raises what that raises, after the document at which it
    did.
    """
    kept = _Kept(stream, rows)
    try:
        for one in stream.said(kept.come(stopped), kept.read):
            yield from kept.take()
            if one is None:
                yield None
    except Exception:
        kept.finish()
        yield from kept.take()
        raise
    yield from kept.take()
    yield Message(fields={"over": True})


class _Kept:
    """The messages of documents, each with the rows that are read for it: one for each part that is read at once, as
    all rows that a document names may be more than memory holds."""

    def __init__(self, stream: DocumentStream, rows: Rows) -> None:
        self._documents, self._rows = stream.documents, rows
        self._message = Message()
        self._parts: list[bytes] = []
        self._shapes: list[list[Any]] = []
        self._done: list[Message] = []

    def come(self, stopped: threading.Event) -> Iterator[Document | str | None]:
        """The documents."""
        for message in self._documents.messages(stopped):
            if message is None:
                yield None
            else:
                self._message, self._parts = message, list(message.parts[:1])
                yield self._documents.read(message)
                self.finish()

    def read(self, wanted: Any, inner: int) -> Iterator[NDArray]:
        """Their rows."""
        first = 0
        for found in self._rows(wanted, inner):
            if first:
                self.finish()
            last = first + len(found)
            if len(found) < wanted.last - wanted.first:
                self._parts = [self._documents.part(self._message, first, last)]
            self._shapes.append([found.dtype.str, list(found.shape)])
            self._parts.append(np.ascontiguousarray(found).tobytes())
            first = last
            yield found

    def finish(self) -> None:
        """All was read that goes with the newest message."""
        if self._parts:
            self._done.append(Message(tuple(self._parts), {"rows": self._shapes}))
        self._parts, self._shapes = [], []

    def take(self) -> Iterator[Message]:
        """Those that are finished."""
        while self._done:
            yield self._done.pop(0)


def decoder_of(stream: DocumentStream) -> Decoder:
    """Makes records of what `messages_of` gives."""
    given: list[Message] = []
    arrays: list[NDArray] = []

    def come() -> Iterator[Document | str | None]:
        while True:
            if not given:
                yield None
                continue
            message = given.pop()
            if "over" in message.fields:
                return
            arrays[:] = _arrays(message)
            yield stream.documents.read(message)

    def rows(wanted: Any, inner: int) -> list[NDArray]:
        if not arrays:
            raise ValueError("a document that names rows which were not read when it was recorded")
        return [arrays.pop(0)]

    records = stream.said(come(), rows)

    def decode(message: Message) -> list[Record]:
        given[:] = [message]
        made = itertools.takewhile(lambda one: one is not None, records)
        return [one for one in made if one is not None]

    return decode


def _arrays(message: Message) -> list[NDArray]:
    """The rows that came with a document. Raises ValueError for what are none."""
    try:
        return [
            np.frombuffer(part, np.dtype(str(dtype))).reshape([int(n) for n in shape])
            for part, (dtype, shape) in zip(message.parts[1:], message.fields["rows"], strict=True)
        ]
    except (KeyError, TypeError, ValueError, OverflowError, SyntaxError) as error:
        raise ValueError(f"a document with rows that are none: {error}") from error


def _of_line(line: bytes) -> Document | str:
    try:
        name, document = json.loads(line)
        if not isinstance(name, str) or not isinstance(document, dict):
            raise ValueError("an array of other things")
    except (ValueError, TypeError, RecursionError):
        return "a line that is no [name, document]"
    return name, document


def _document(name: str, text: bytes) -> Document:
    if text[:1] == b"\x80":
        raise Refused(
            "a pickled document, which is not opened: publish with "
            "Publisher(..., serializer=steering.sources.bluesky_plan.to_json)"
        )
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("a document that is no JSON") from error
    if not isinstance(document, dict):
        raise Refused("a document that is no JSON object")
    return name, document
