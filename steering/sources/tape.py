"""Records live streams with their timing into one file, and plays them again as streams.

The file: the line `steering streams 1`, then blocks: two lengths (4 and 8 bytes, big-endian), a JSON header, bytes.
It is written as it comes, and a last block that is torn is left out when it is read. Nothing in it is executed.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from steering.sources.streams import FRAMES, Began, Ended, Frame, Record, Samples, Stream, Unreadable

_MAGIC = b"steering streams 1\n"
_LENGTHS = struct.Struct(">IQ")
_HEADER, _BYTES = 2**20, 2**30
"""Most that a block may hold."""
_LOOK_S = 0.1


def record(streams: Mapping[str, Stream], path: Path, stopped: threading.Event) -> dict[str, int]:
    """Record streams, by name, until `stopped` is set. Returns the records of each.

    Raises FileExistsError for a file that is there, and what a stream raises, after the others have ended.
    """
    counts, errors, turn = dict.fromkeys(streams, 0), list[BaseException](), threading.Lock()
    with path.open("xb") as file:
        file.write(_MAGIC)
        begun = time.monotonic()

        def follow(name: str, stream: Stream) -> None:
            try:
                for one in stream.records(stopped):
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
        raise errors[0]
    return counts


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

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The records, each when it is due; at the end of the file the last scan is over."""
        begun, frames = time.monotonic(), 0
        with Path(self.file).open("rb") as file:
            for at, stream, one in read(file):
                frames += stream == FRAMES and isinstance(one, Frame)
                if stream != self.stream:
                    continue
                while (ahead := self._ahead(begun, at, frames)) > 0:
                    if stopped.wait(min(ahead, _LOOK_S)):
                        return
                    yield None
                if stopped.is_set():
                    return
                yield one._replace(time=time.time()) if isinstance(one, Frame) else one
        yield Ended(last=True)
        while not stopped.wait(0.1):
            yield None

    def _ahead(self, begun: float, at: float, frames: int) -> float:
        """Seconds until a record may come that came at this time, among so many frames."""
        if self.step:
            return np.inf if frames > steps(Path(self.step)) else 0.0
        return begun + at / self.speed - time.monotonic() if self.speed else 0.0


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


def read(file: BinaryIO) -> Iterator[tuple[float, str, Record]]:
    """When each record came, in seconds, in which stream, and what it was.

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


def _write(file: BinaryIO, stream: str, at: float, one: Record) -> None:
    try:
        fields, payload = _encoded(one)
        kind = type(one).__name__
    except ValueError as error:  # a frame whose payload is damaged
        kind, fields, payload = "Unreadable", {"reason": str(error)}, b""
    header = json.dumps({"stream": stream, "at": at, "kind": kind, **fields}).encode()
    file.write(_LENGTHS.pack(len(header), len(payload)) + header + payload)
    file.flush()


def _encoded(one: Record) -> tuple[dict[str, Any], bytes]:
    match one:
        case Frame(counts=counts):
            own = None if one.own is None else one.own.tolist()
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


def _decoded(text: bytes, payload: bytes) -> tuple[float, str, Record]:
    try:
        fields = json.loads(text)
        kind, array = fields["kind"], None
        if "dtype" in fields:
            dtype = np.dtype(str(fields["dtype"]))
            if dtype.kind not in "uifb":
                raise ValueError(f"an array of {dtype}")
            array = np.frombuffer(payload, dtype).reshape([int(n) for n in fields["shape"]])
        return float(fields["at"]), str(fields["stream"]), _record(kind, fields, array)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, SyntaxError) as error:
        raise ValueError(f"found a damaged block ({type(error).__name__}: {error}), expected a record") from error


def _record(kind: str, fields: Mapping[str, Any], array: NDArray | None) -> Record:
    if kind == "Frame" and array is not None and array.ndim == 2:
        own = None if fields["own"] is None else np.array(fields["own"], np.float64)
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
