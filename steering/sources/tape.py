"""Records live streams with their timing into one file, and plays them again as streams.

Where a stream has messages these are kept as they came, with the addresses of the streams, and decoded when they are
played: what goes wrong in decoding goes wrong again. Of streams without messages what was read is kept.

The file: the line `steering streams 1`, then blocks: two lengths (4 and 8 bytes, big-endian), a JSON header, bytes.
It is written as it comes, and a last block that is torn is left out when it is read. Nothing in it is executed.
"""

from __future__ import annotations

import itertools
import json
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steering.records.plain import plain, whole
from steering.sources.streams import (
    FRAMES,
    POSITIONS,
    Began,
    Decoder,
    Ended,
    Frame,
    Message,
    MessageStream,
    Record,
    Samples,
    Stream,
    Unreadable,
    decoded,
)

_MAGIC = b"steering streams 1\n"
_LENGTHS = struct.Struct(">IQ")
_HEADER, _BYTES = 2**20, 2**30
"""Most that a block may hold."""
_LOOK_S, _BEGIN_S = 0.1, 2.0


class Address(NamedTuple):
    """Where a stream came from, which says how its messages are decoded."""

    text: str


def record(
    streams: Mapping[str, Stream], path: Path, stopped: threading.Event, addresses: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Record streams, by name, until `stopped` is set. Returns how many messages, or records, of each.

    addresses: of the streams; without them records are kept in place of messages. Raises FileExistsError for a file
    that is there, OSError where none can be, and what a stream raises, after the others have ended: where nothing came
    before that, no file is left.
    """
    addresses = addresses or {}
    counts, errors, turn = dict.fromkeys(streams, 0), list[BaseException](), threading.Lock()
    with _new(path) as file:
        file.write(_MAGIC)
        begun = time.monotonic()
        for name, text in addresses.items():
            _write(file, name, 0.0, Address(text))

        def follow(name: str, stream: Stream) -> None:
            try:
                for one in _come(stream, stopped, as_messages=bool(addresses)):
                    if one is not None:
                        with turn:
                            _write(file, name, time.monotonic() - begun, one)
                            counts[name] += 1
            except BaseException as error:  # the boundary of this thread: raised below
                errors.append(error)
                stopped.set()

        threads = [threading.Thread(target=follow, args=each, daemon=True) for each in streams.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        if not any(counts.values()):
            path.unlink()
        raise errors[0]
    return counts


def _new(path: Path) -> BinaryIO:
    """A new file, open for writing."""
    try:
        return path.open("xb")
    except FileExistsError as error:
        raise FileExistsError(f"{path}: found a file, expected a new name: a recording replaces nothing") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: found no folder {path.parent}, expected it: make it first") from error


def _come(stream: Stream, stopped: threading.Event, *, as_messages: bool) -> Iterator[Record | Message | None]:
    if as_messages and isinstance(stream, MessageStream):
        yield from stream.messages(stopped)
    else:
        yield from stream.records(stopped)


def addresses_in(path: Path) -> dict[str, str]:
    """The addresses at which the streams of a recording were recorded, by name; those of records have none.

    Raises OSError, and ValueError for a file that is no recording.
    """
    with path.open("rb") as file:
        first = itertools.takewhile(lambda block: isinstance(block[2], Address), read(file))
        return {stream: one.text for _, stream, one in first if isinstance(one, Address)}


@dataclass(frozen=True, kw_only=True)
class Played:
    """One stream of a recording, at its own speed or another."""

    file: str
    stream: str
    speed: float = 1.0
    """2 is twice as fast; 0: without waiting."""
    step: str = ""
    """File of text whose lines say how many more frames may come, with all that came before them: empty lines count as
    1, and whoever appends one makes a step. Empty: frames come when they are due."""
    streams_at: Callable[[Mapping[str, str]], Mapping[str, Stream]] | None = None
    """Makes streams of their addresses, by name: they decode their messages. None: there are none."""
    order: InOrder | None = None
    """Of streams of the same file that are played together; None: there are no others."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The records, each when it is due; at the end of the file the last scan is over."""
        try:
            yield from self._played(stopped)
        finally:
            if self.order is not None:
                self.order.note(self.stream, np.inf)
        while not stopped.wait(0.1):
            yield None

    def _played(self, stopped: threading.Event) -> Iterator[Record | None]:
        begun, frames, decoders = time.monotonic(), 0, _Decoders(self.streams_at)
        with Path(self.file).open("rb") as file:
            for block, (at, stream, one) in enumerate(read(file)):
                if stream != self.stream and not (self.step and stream == FRAMES):
                    decoders.note(stream, one)
                    continue
                records = decoders.records(stream, one)
                frames += sum(stream == FRAMES and isinstance(each, Frame) for each in records)
                if self.order is not None and stream == self.stream:
                    self.order.note(stream, block)
                while (ahead := self._ahead(begun, at, frames)) > 0:
                    if stopped.wait(min(ahead, _LOOK_S)):
                        return
                    yield None
                if stream != self.stream:
                    continue
                yield from self._in_order(block, records, stopped)
                if stopped.is_set():
                    return
                yield from (each._replace(time=time.time()) if isinstance(each, Frame) else each for each in records)
        yield Ended(last=True)

    def _in_order(self, block: int, records: Sequence[Record], stopped: threading.Event) -> Iterator[None]:
        """Until a block's records may come, where a scan begins or ends with them."""
        if self.order is None or not any(isinstance(each, Began | Ended) for each in records):
            return
        while not self.order.wait(block, _LOOK_S) and not stopped.is_set():
            yield None

    def _ahead(self, begun: float, at: float, frames: int) -> float:
        """Seconds until a record may come that came at this time, among so many frames."""
        if self.step:
            return np.inf if frames > steps(Path(self.step)) else 0.0
        return begun + at / self.speed - time.monotonic() if self.speed else 0.0


class InOrder:
    """Has streams of one file begin and end scans in the order of the file: without a clock, or by one that goes fast,
    one would be ahead by scans. Pickled together with its streams it is theirs again."""

    def __init__(self, streams: Iterable[str]) -> None:
        self._streams = tuple(streams)
        self._next: dict[str, float] = {}
        """Place in the file of what each stream that plays says now, or waits to say."""
        self._by = np.inf
        """When those that have not begun are waited for no more."""
        self._turn = threading.Condition()

    def __reduce__(self) -> tuple[type[InOrder], tuple[tuple[str, ...]]]:
        return InOrder, (self._streams,)

    def note(self, stream: str, block: float) -> None:
        """A stream has said all of its blocks before this one; infinite: it says no more."""
        with self._turn:
            self._by = min(self._by, time.monotonic() + _BEGIN_S)
            self._next[stream] = block
            self._turn.notify_all()

    def wait(self, block: float, wait_s: float) -> bool:
        """Whether the blocks of all streams before this one are said, at the latest after so many seconds."""
        with self._turn:
            return self._turn.wait_for(lambda: self._first() >= block, wait_s)

    def _first(self) -> float:
        late = -1.0 if time.monotonic() < self._by else np.inf
        return min(self._next.get(stream, late) for stream in self._streams)


class _Decoders:
    """The decoder of each stream of a file, made when its first message comes."""

    def __init__(self, streams_at: Callable[[Mapping[str, str]], Mapping[str, Stream]] | None) -> None:
        self._streams_at = streams_at
        self._addresses: dict[str, str] = {}
        self._decoders: dict[str, Decoder] = {}

    def note(self, stream: str, one: Record | Message | Address) -> None:
        """A block of a stream that is not played: its address may say how another one is decoded."""
        if isinstance(one, Address):
            self._addresses[stream] = one.text

    def records(self, stream: str, one: Record | Message | Address) -> Sequence[Record]:
        """What a block of a stream holds. Raises ValueError for messages of a stream that has none."""
        self.note(stream, one)
        if isinstance(one, Address):
            return []
        if not isinstance(one, Message):
            return [one]
        if stream not in self._decoders:
            made = {} if self._streams_at is None else self._streams_at(self._addresses)
            decoding = made.get(stream)
            if not isinstance(decoding, MessageStream):
                raise ValueError(
                    f"found messages of {stream} in a recording of {self._addresses or 'no address'}, expected the "
                    "address of a stream of messages"
                )
            self._decoders[stream] = decoding.decoder()
        return decoded(self._decoders[stream], one)


def steps(file: Path) -> int:
    """Frames that may have come by now by the lines of a file; none where there is no file yet. Raises ValueError for
    lines that are no whole numbers of 0 or more."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    wrong = next((line for line in lines if line.strip() and not line.strip().isdecimal()), None)
    if wrong is not None:
        raise ValueError(f"{file}: found the line {wrong[:40]!r}, expected how many more frames may come, or nothing")
    return sum(int(line) if line.strip() else 1 for line in lines)


def read(file: BinaryIO) -> Iterator[tuple[float, str, Record | Message | Address]]:
    """When each message, or record, came, in seconds, in which stream, and what it was; first the streams' addresses.

    Raises ValueError, and nothing else, for what is no such file.
    """
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError(
            "found a file that is no recording of streams, expected one that `steering record` has written"
        )
    while len(lengths := file.read(_LENGTHS.size)) == _LENGTHS.size:
        header, size = _LENGTHS.unpack(lengths)
        if header > _HEADER or size > _BYTES:
            raise ValueError(f"found a block of {header} and {size} bytes, expected at most {_HEADER} and {_BYTES}")
        text, payload = file.read(header), file.read(size)
        if len(text) < header or len(payload) < size:
            return  # torn: whoever recorded was ended there
        yield _decoded(text, payload)


def _write(file: BinaryIO, stream: str, at: float, one: Record | Message | Address) -> None:
    try:
        fields, payload = _encoded(one)
        kind = type(one).__name__
    except ValueError as error:  # a frame whose payload is damaged
        kind, fields, payload = "Unreadable", {"reason": str(error)}, b""
    header = json.dumps({"stream": stream, "at": at, "kind": kind, **fields}).encode()
    file.write(_LENGTHS.pack(len(header), len(payload)) + header + payload)
    file.flush()


def _encoded(one: Record | Message | Address) -> tuple[dict[str, Any], bytes]:
    match one:
        case Message(parts=parts):
            parts = (json.dumps(plain(dict(one.fields))).encode(), *parts)
            return {"sizes": [len(part) for part in parts]}, b"".join(parts)
        case Address():
            return {"address": one.text}, b""
        case Frame(counts=counts):
            own = {name: row.tolist() for name, row in one.own.items()}
            image = np.ascontiguousarray(counts)
            return {"number": one.number, "own": own, **_of(image)}, image.tobytes()
        case Samples(rows=rows):
            return {"first": one.first, **_of(rows)}, np.ascontiguousarray(rows).tobytes()
        case Began():
            header = {name: value for name, value in one.header.items() if not isinstance(value, np.ndarray)}
            bad = one.header.get("bad")
            shape = _of(bad) if bad is not None else {}
            return {
                "name": one.name,
                "first": one.first,
                "header": header,
                **shape,
            }, b"" if bad is None else bad.tobytes()
        case Ended():
            return {"frames": one.frames, "last": one.last}, b""
    return {"reason": one.reason}, b""


def _of(array: NDArray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": array.dtype.str}


def _decoded(text: bytes, payload: bytes) -> tuple[float, str, Record | Message | Address]:
    try:
        fields = json.loads(text)
        kind, array = fields["kind"], None
        if "dtype" in fields:
            dtype = np.dtype(str(fields["dtype"]))
            if dtype.kind not in "uifb":
                raise ValueError(f"an array of {dtype}")
            array = np.frombuffer(payload, dtype).reshape([int(n) for n in fields["shape"]])
        if kind == "Message":
            return float(fields["at"]), str(fields["stream"]), _message(fields["sizes"], payload)
        if kind == "Address":
            return float(fields["at"]), str(fields["stream"]), Address(str(fields["address"]))
        return float(fields["at"]), str(fields["stream"]), _record(kind, fields, array)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, SyntaxError) as error:
        raise ValueError(f"found a damaged block ({type(error).__name__}: {error}), expected a record") from error


def _message(sizes: Sequence[int], payload: bytes) -> Message:
    ends = np.cumsum(np.array(sizes, np.int64)).tolist()
    if not ends or min(sizes) < 0 or ends[-1] != len(payload):
        raise ValueError(f"parts of {str(sizes)[:100]} bytes in {len(payload)}")
    said, *parts = (payload[end - size : end] for end, size in zip(ends, sizes, strict=True))
    found = whole(json.loads(said))
    if not isinstance(found, dict):
        raise ValueError("a message without what came beside it")
    return Message(tuple(parts), found)


def _record(kind: str, fields: Mapping[str, Any], array: NDArray | None) -> Record:
    if kind == "Frame" and array is not None and array.ndim == 2:
        said = fields["own"] or {}
        said = {POSITIONS: said} if isinstance(said, list) else said  # as older recordings have it
        own = {name: np.array(row, np.float64) for name, row in said.items()}
        return Frame(int(fields["number"]), array, 0.0, own)
    if kind == "Samples" and array is not None and array.ndim == 2:
        return Samples(int(fields["first"]), array.astype(np.float64))
    if kind == "Began":
        header = {name: tuple(v) if isinstance(v, list) else v for name, v in fields["header"].items()}
        first = fields["first"]
        bad = {} if array is None else {"bad": array != 0}
        return Began(fields["name"], None if first is None else int(first), header | bad)
    if kind == "Ended":
        frames = fields["frames"]
        return Ended(None if frames is None else int(frames), bool(fields["last"]))
    if kind == "Unreadable":
        return Unreadable(str(fields["reason"]))
    raise ValueError(f"a record of kind {kind!r}")
