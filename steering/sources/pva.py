"""EPICS PV Access: frames as NTNDArray, positions as their attributes or as a table.

The number of a frame is its uniqueId. p4p refuses compressed arrays and hides the uniqueId, so that arrays are taken as
they are and decoded here. Updates that the queue of the subscription had to drop show as missing numbers.

What a PV holds when it is connected comes first, and again when its server comes back: the last frame of a scan that is
over, or one of a scan that runs. Clocks of other machines do not tell which, so that it is left out and counted: one
frame less is a gap, one of before a wrong image. Needs the extra `epics`.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.sources.compression import LARGEST, Decompressor
from steering.sources.pva_client import Updates, context
from steering.sources.streams import (
    Began,
    Decoder,
    Ended,
    Frame,
    Message,
    Packed,
    Record,
    Samples,
    Unreadable,
    records_of,
)

_SCALARS = ("|i1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "<f4", "<f8")
"""dtypes of pvData's ScalarType (0 is boolean)."""
_POLL_S, _QUIET_S = 0.05, 0.5
"""Arrays may come so much later than the PV that says that all is done: another subscription."""
_RESTART, _REORDERED, _AGAIN_S = 64, 16, 0.2
"""A uniqueId so far below a higher one that came before begins another scan, where time stamps say nothing. Where they
do one that is later begins one: at all where it is farther below than plugins in several threads reorder; and by so
many seconds where it is not, as some servers stamp arrays when they send them."""
HELD = "what the PV held when it was connected: of a scan before, or one frame of a scan that runs"
"""Why it is left out."""


@dataclass(frozen=True, kw_only=True)
class PvaFrames:
    """Frames that a PV publishes."""

    pv: str
    server: str = ""
    """HOST:PORT; empty: EPICS's own search, as the environment says."""
    queue: int = 1024
    """Updates that the subscription keeps; the usual 4 lose frames silently."""
    attributes: Mapping[str, PvaTable] = field(default_factory=dict)
    """Companions whose columns are attributes of the frames, by name."""
    scan: str = ""
    """Name of an attribute with the scan's name: another value begins another scan."""
    done: str = ""
    """A PV that becomes true when no further frame will come; what it holds before the first is of a scan before."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The frames, as they come."""
        return records_of(self, stopped)

    def messages(self, stopped: threading.Event) -> Iterator[Message | None]:
        """The arrays with what is said of them, and that all is done."""
        with context(self.server) as client:
            arrays = Updates(client, self.pv, self.queue)
            done = Updates(client, self.done, 4) if self.done else None
            came = over = False
            while not stopped.is_set():
                quiet = over
                update = arrays.next(_QUIET_S if over else _POLL_S)
                if update is not None:
                    came = came or not update.held
                    yield nd_message(*update)
                    continue
                while done is not None and (said := done.next(0.0)) is not None:
                    over = bool(said.value["value"]) and (came or not said.held)
                if quiet and over:
                    over = False
                    yield Message(fields={"done": True})
                if arrays.listens:
                    yield None

    def decoder(self) -> Decoder:
        """See MessageStream."""
        decode = NdArrays(self.attributes, self.scan)
        return lambda message: [Ended(last=True)] if "done" in message.fields else decode(nd_fields(message))


@dataclass(frozen=True, kw_only=True)
class PvaTable:
    """Positions that an NTTable publishes: a row for each sample, with the number of its frame."""

    pv: str
    columns: tuple[str, ...]
    scale: tuple[float, ...]
    server: str = ""
    number: str = "number"
    """Column of the frames' numbers."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The samples, as they come."""
        return records_of(self, stopped)

    def messages(self, stopped: threading.Event) -> Iterator[Message | None]:
        """The tables, as they come."""
        with context(self.server) as client:
            monitor = Updates(client, self.pv, 1024)
            while not stopped.is_set():
                update = monitor.next(_POLL_S)
                if update is None:
                    if monitor.listens:
                        yield None
                    continue
                columns: dict[str, Any] = getattr(update.value.get("value"), "todict", dict)()
                held = {"held": True} if update.held else {}
                yield Message(fields={"columns": {name: _plain(column) for name, column in columns.items()}, **held})

    def decoder(self) -> Decoder:
        """See MessageStream."""
        return self._samples

    def _samples(self, message: Message) -> list[Record]:
        columns = message.fields.get("columns")
        try:
            records = table(columns if isinstance(columns, Mapping) else {}, self.number, self.columns, self.scale)
        except ValueError as error:
            raise ValueError(f"an update of {self.pv} that is no table: {error}") from error
        return [Unreadable(HELD)] if records and message.fields.get("held") else records


@dataclass(frozen=True, kw_only=True)
class NoRecords:
    """A stream whose samples come with the frames."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """Nothing."""
        while not stopped.wait(0.1):
            yield None


def table(fields: Mapping[str, Any], number: str, columns: Sequence[str], scale: Sequence[float]) -> list[Record]:
    """The samples in the columns of a table. Raises ValueError, and nothing else, for columns that make none."""
    missing = [name for name in (number, *columns) if name not in fields]
    if missing:
        raise ValueError(f"columns {', '.join(map(str, fields))[:200]}, expected {missing[0]} among them")
    try:
        numbers = np.asarray(fields[number], np.int64)
        rows = np.stack([np.asarray(fields[name], np.float64) for name in columns], axis=1) * np.asarray(scale)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"columns that hold no numbers, or not equally many: {error}") from error
    if numbers.ndim != 1 or len(numbers) != len(rows) or (numbers < 0).any():
        raise ValueError(f"{numbers.shape} frame numbers for {len(rows)} rows, expected one of 0 or more for each")
    return [Samples(int(n), row[None]) for n, row in zip(numbers, rows, strict=True)]


def nd_message(value: Any, held: bool = False) -> Message:
    """An NTNDArray as it came: its array's bytes, and what is said of it. held: by its PV when that was connected."""
    array, said = (
        value["value"],
        {
            "codec": value["codec.name"],
            "parameters": _plain(value["codec.parameters"]),
            "uncompressed": value["uncompressedSize"],
            "unique": value["uniqueId"],
            "time": taken_at(value),
            "size": [dimension["size"] for dimension in value["dimension"]],
            "attributes": {attribute["name"]: _plain(attribute["value"]) for attribute in value["attribute"]},
            **({"held": True} if held else {}),
        },
    )
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "uifb":
        return Message(fields={"value": _plain(array), **said})
    return Message((np.ascontiguousarray(array).view(np.uint8),), {"dtype": array.dtype.str, **said})


def stamp(fields: Any) -> float:
    """Seconds since the epoch of EPICS's time structure; 0 where it is not set."""
    return 0.0 if fields is None else float(fields["secondsPastEpoch"]) + 1e-9 * float(fields["nanoseconds"])


def taken_at(value: Any) -> float:
    """When an NTNDArray was taken by its own clock, seconds since the epoch; 0 where it does not say."""
    return stamp(value.get("dataTimeStamp")) or stamp(value.get("timeStamp"))


def nd_fields(message: Message) -> dict[str, Any]:
    """What an NTNDArray says, with its array as `value`. Raises ValueError for a message of something else."""
    fields = dict(message.fields)
    if "dtype" in fields:
        try:
            [payload] = message.parts
            dtype = np.dtype(str(fields["dtype"]))
            fields["value"] = np.frombuffer(payload, dtype) if len(payload) else np.empty(0, dtype)
        except (TypeError, SyntaxError) as error:
            raise ValueError(f"an array of {str(fields['dtype'])[:40]!r}, expected numbers") from error
    return fields


def _plain(value: Any) -> Any:
    """A value of pvData, as it can be recorded: what is neither number, text nor array of numbers is given in words."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "uifb":
        return value
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str | np.number) else str(value)


class Scans:
    """Tells by numbers, time stamps and attributes when another scan begins."""

    def __init__(self, attribute: str = "") -> None:
        """attribute: with the scan's name; empty: there is none."""
        self.attribute = attribute
        self._name: str | None = None
        self._highest, self._when = -1, 0.0
        self._began = False

    def begun(self, attributes: Mapping[str, Any], number: int, when: float) -> list[Record]:
        """What begins with the array of this number and these attributes. when: its time stamp, seconds; 0: none."""
        name = attributes.get(self.attribute) if self.attribute else None
        begins = not self._began or self._again(number, when) or (name is not None and str(name) != self._name)
        if begins or number > self._highest:
            self._highest, self._when = number, when
        if not begins:
            return []
        self._began, self._name = True, None if name is None else str(name)
        # The first of a scan that we saw begin is its first; before that an update may have been missed.
        return [Began(self._name, None)]

    def _again(self, number: int, when: float) -> bool:
        """The numbers have begun again: this one is none of the same scan out of order, nor one that comes twice."""
        behind, later = self._highest - number, when - self._when
        stamped = when > 0 and self._when > 0 and later != 0
        if behind > _RESTART and (number <= 1 or not stamped):
            return True
        return stamped and behind >= 0 and later > (0.0 if behind > _REORDERED else _AGAIN_S)


class NdArrays:
    """Decodes NTNDArrays; it remembers which scan they belong to."""

    def __init__(self, attributes: Mapping[str, PvaTable] | None = None, scan: str = "") -> None:
        """attributes, scan: as of PvaFrames."""
        self._attributes = attributes or {}
        self._scans = Scans(scan)
        self._decompress = Decompressor()

    def __call__(self, fields: Mapping[str, Any]) -> list[Record]:
        """The records of one update. Raises ValueError, and nothing else, for what is no frame."""
        size = fields.get("size")
        if fields.get("value") is None or size == []:
            return []  # what an idle PV holds: no frame yet
        number = fields.get("unique")
        if not isinstance(number, int) or not 0 <= number < 2**40:
            raise ValueError(f"an array with uniqueId {number!r}, expected 0 or more")
        if not isinstance(size, list) or not isinstance(fields.get("attributes"), Mapping):
            raise ValueError("an array without a list of dimensions and attributes, expected an NTNDArray")
        if len(size) == 3 and 1 in size:
            size = [n for n in size if n != 1] or size
        if len(size) != 2 or not all(isinstance(n, int) and 0 < n < 2**16 for n in size):
            raise ValueError(f"an array of {size} (x first), expected two dimensions")
        if fields.get("held"):
            return [Unreadable(HELD)]
        counts = self._counts(fields, (size[1], size[0]))
        own, when = self._own(fields), fields.get("time")
        # Recordings of before have none.
        begun = self._scans.begun(fields["attributes"], number, when if isinstance(when, int | float) else 0.0)
        return [*begun, Frame(number, counts, time.time(), own)]

    def _own(self, fields: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
        attributes, found = fields["attributes"], {}
        for name, of in self._attributes.items():
            try:
                row = np.array([float(attributes[column]) for column in of.columns])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"an array with the attributes {', '.join(map(str, attributes))[:200]}, expected the numbers "
                    f"{', '.join(of.columns)}"
                ) from error
            found[name] = row * of.scale
        return found

    def _counts(self, fields: Mapping[str, Any], shape: tuple[int, int]) -> NDArray | Packed:
        value, codec = np.asarray(fields["value"]), str(fields.get("codec") or "")
        if value.ndim != 1 or value.dtype.kind not in "iuf":
            raise ValueError(f"an array of {value.dtype} {value.shape}, expected numbers in one dimension")
        if not codec:
            if value.size != shape[0] * shape[1]:
                raise ValueError(f"an array of {value.size} elements, expected {shape} (y, x)")
            return value.reshape(shape)
        payload = value.tobytes()
        if codec == "jpeg":
            return _jpeg(payload, shape)
        dtype = _dtype(fields, shape)
        if codec in ("bslz4", "lz4"):
            # Over PVA the first 12 bytes of the framing are left away: the block is the codec's usual one.
            total = shape[0] * shape[1] * dtype.itemsize
            return self._framed(codec, payload, shape, dtype, total)
        if codec == "lz4hdf5":
            return self._decompress.later("lz4", payload, shape, dtype)
        return self._decompress.later(codec, payload, shape, dtype)

    def _framed(self, codec: str, payload: bytes, shape: tuple[int, int], dtype: np.dtype, total: int) -> Packed:
        if codec == "bslz4":
            framed = total.to_bytes(8, "big") + _bitshuffle_block(dtype) + payload
            return self._decompress.later(codec, framed, shape, dtype)
        # One lz4 block without any framing: HDF5's has the size of the block and of its compressed bytes.
        header = total.to_bytes(8, "big") + total.to_bytes(4, "big") + len(payload).to_bytes(4, "big")
        return self._decompress.later(codec, header + payload, shape, dtype)


def _bitshuffle_block(dtype: np.dtype) -> bytes:
    """Bytes of a block: bitshuffle's default is 8192 bytes in elements, rounded to a multiple of 8, at least 128."""
    elements = max(8192 // dtype.itemsize // 8 * 8, 128)
    return (elements * dtype.itemsize).to_bytes(4, "big")


def _dtype(fields: Mapping[str, Any], shape: tuple[int, int]) -> np.dtype:
    """Of the compressed elements: codec.parameters, where the uncompressed size agrees; else by that size, unsigned."""
    stated, total = fields.get("parameters"), fields.get("uncompressed")
    pixels = shape[0] * shape[1]
    if isinstance(stated, int) and 0 <= stated < len(_SCALARS):
        dtype = np.dtype(_SCALARS[stated])
        if dtype.itemsize * pixels == total:
            return dtype
    if not isinstance(total, int) or total % pixels or total // pixels not in (1, 2, 4, 8) or total > LARGEST:
        raise ValueError(f"an array of {total!r} bytes when decompressed, expected {shape} elements of 1, 2, 4 or 8")
    return np.dtype(f"<u{total // pixels}")


def _jpeg(payload: bytes, shape: tuple[int, int]) -> NDArray:
    from PIL import Image  # noqa: PLC0415

    try:
        with Image.open(io.BytesIO(payload), formats=("JPEG",)) as image:
            if image.size != shape[::-1]:
                raise ValueError(f"a JPEG of {image.size}, expected {shape[::-1]} (x, y)")
            return np.asarray(image.convert("L"))
    except Exception as error:  # whatever the decoder meets in bytes from outside
        raise ValueError(f"a damaged JPEG of {len(payload)} bytes: {error}") from error
