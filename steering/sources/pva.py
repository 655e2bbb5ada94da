"""EPICS PV Access: frames as NTNDArray, positions as their attributes or as a table.

The number of a frame is its uniqueId, less that of a scan's first frame where it is joined with what counts from 0. It
is told, not taken from the first that comes: were one lost every position would be another frame's. p4p refuses
compressed arrays and hides the uniqueId, so that arrays are taken as they are and decoded here. Updates that the queue
of the subscription had to drop show as missing numbers.

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
from steering.sources.pva_scans import Scans, numbered, taken_at
from steering.sources.streams import (
    Decoder,
    Ended,
    Frame,
    Message,
    Packed,
    Record,
    Samples,
    Unreadable,
    WrongProtocol,
    records_of,
)

_SCALARS = ("|i1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "<f4", "<f8")
"""dtypes of pvData's ScalarType (0 is boolean)."""
_POLL_S, _QUIET_S = 0.05, 0.5
"""Arrays may come so much later than the PV that says that all is done: another subscription."""
HELD = "what the PV held when it was connected: of a scan before, or one frame of a scan that runs"
"""Why it is left out."""
GOES_ON = (
    "the uniqueIds of a scan go on after those of the scan before, expected first= again: none of its frames goes with "
    "what counts from 0; set the detector's ArrayCounter to 0 before each scan"
)
"""Said of a scan whose frames find no positions."""
_ZEROS = 3
"""Arrays in a row that may have the uniqueId 0: the first one of a scan, and what a server repeats of it."""


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
    first: int = 0
    """uniqueId of the first frame of each scan, which has the number 0."""

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
                    refuse_other_than_arrays(self.pv, update.value)
                    yield nd_message(*update)
                    continue
                while done is not None and (said := done.next(0.0)) is not None:
                    over = _is_true(self.done, said.value) and (came or not said.held)
                if quiet and over:
                    over = False
                    yield Message(fields={"done": True})
                if arrays.listens:
                    yield None

    def decoder(self) -> Decoder:
        """See MessageStream."""
        decode = NdArrays(self.attributes, self.scan, self.first)
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
    first: int = 0
    """As of the frames."""

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
            records = [Samples(numbered(one.first, self.first), one.rows) for one in records]
        except ValueError as error:
            raise ValueError(f"an update of {self.pv} that is no table: {error}") from error
        return [Unreadable(HELD)] if records and message.fields.get("held") else list(records)


@dataclass(frozen=True, kw_only=True)
class NoRecords:
    """A stream whose samples come with the frames."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """Nothing."""
        while not stopped.wait(0.1):
            yield None


def table(fields: Mapping[str, Any], number: str, columns: Sequence[str], scale: Sequence[float]) -> list[Samples]:
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


def refuse_other_than_arrays(pv: str, value: Any) -> None:
    """Raise WrongProtocol for an update that is no NTNDArray."""
    if value.get("uniqueId") is None or value.get("dimension") is None:
        raise WrongProtocol(
            f"{pv}: found {value.getID()}, expected an NTNDArray, as areaDetector's PVA plugin publishes "
            "(DET:Pva1:Image): a waveform has neither the number nor the shape of a frame"
        )


def _is_true(pv: str, value: Any) -> bool:
    """What a PV says, of a number or of a record with named states (bi, busy, mbbi)."""
    held = value.get("value")
    held = held.get("index") if hasattr(held, "todict") else held
    if not isinstance(held, bool | int | float | np.number):
        raise WrongProtocol(f"{pv}: found {value.getID()}, expected a number, or named states, of the PV of done=")
    return bool(held)


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


class NdArrays:
    """Decodes NTNDArrays; it remembers which scan they belong to."""

    def __init__(self, attributes: Mapping[str, PvaTable] | None = None, scan: str = "", first: int = 0) -> None:
        """attributes, scan, first: as of PvaFrames."""
        self._attributes = attributes or {}
        self._first, self._last, self._zeros = first, -1, 0
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
        self._refuse_zeros(number)
        if len(size) != 2 or not all(isinstance(n, int) and 0 < n < 2**16 for n in size):
            raise ValueError(f"an array of {size} (x first), expected two dimensions")
        if fields.get("held"):
            return [Unreadable(HELD)]
        counts, mine = self._counts(fields, (size[1], size[0])), numbered(number, self._first)
        own, when = self._own(fields), fields.get("time")
        # Recordings of before have none.
        begun = self._scans.begun(fields["attributes"], number, when if isinstance(when, int | float) else 0.0)
        if begun and 0 < self._first < number == self._last + 1:
            begun.append(Unreadable(GOES_ON))
        self._last = number
        return [*begun, Frame(mine, counts, time.time(), own)]

    def _refuse_zeros(self, number: int) -> None:
        """Raise WrongProtocol where arrays have no numbers; one that comes twice may be the first."""
        self._zeros = 0 if number else self._zeros + 1
        if self._zeros > _ZEROS:
            raise WrongProtocol(
                f"found the uniqueId 0 in {self._zeros} arrays in a row, expected one that counts, by which positions "
                "are joined: areaDetector sends it; with p4p set value['uniqueId'], which wrap() leaves 0"
            )

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
