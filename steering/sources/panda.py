"""Positions over ZMQ as JSON: what a PandA's client sends, and MAX IV's variant of it. Needs the extra `dectris`.

PandA: {"message_type": "start"}, then "data" with "datasets": {"/INENC2.VAL.Value": {"starting_sample_number",
"data"}}, then "stop" with "emitted_frames". MAX IV: "series-start", "data" with "frame_number" (the first of the
message) and a list per column, "series-end". Several samples of a frame are averaged by the joiner; how many there are
must be given, and another number is refused where the last message says how many frames there were.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.sources.streams import ARMED, Began, Decoder, Ended, Message, Record, Samples, records_of
from steering.sources.zmq_socket import received

_NOT_COLUMNS = ("message_id", "message_type", "type", "version", "frame_number", "datasets")


@dataclass(frozen=True, kw_only=True)
class PandaPositions:
    """Columns of an encoder stream: positions, or a monitor."""

    address: str
    columns: tuple[str, ...]
    """Names of the columns, of positions y first; a name matches the dataset that holds it."""
    scale: tuple[float, ...]
    """What each column is multiplied by, so that metres come out (or object pixels)."""
    socket: str = "pull"
    """pull or sub."""
    high_water: int = 100_000

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The samples, as they come."""
        return records_of(self, stopped)

    def messages(self, stopped: threading.Event) -> Iterator[Message | None]:
        """Their messages."""
        return received(self.address, self.socket, self.high_water, stopped)

    def decoder(self) -> Decoder:
        """See MessageStream."""
        return lambda message: panda(message.parts[0], self.columns, self.scale)


def panda(message: bytes, columns: tuple[str, ...], scale: tuple[float, ...]) -> list[Record]:
    """The records of one message. Raises ValueError, and nothing else, for what is no such message."""
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a message of {len(message)} bytes that is no JSON") from error
    if not isinstance(fields, Mapping):
        raise ValueError(f"a JSON {type(fields).__name__}, expected an object with message_type")
    kind = str(fields.get("message_type", fields.get("type")))
    if kind in ("start", "series-start"):
        name = fields.get("scan")
        return [Began(None if name is None else str(name), 0, {ARMED: True})]
    if kind in ("stop", "series-end", "end"):
        frames = fields.get("emitted_frames")
        known = isinstance(frames, int) and not isinstance(frames, bool) and 0 <= frames < 2**40
        return [Ended(frames if known else None, last=fields.get("last") is True)]
    if kind != "data":
        raise ValueError(f"a message of type {kind[:40]!r}, expected start, data or stop")
    first, arrays = _columns(fields, columns)
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1:
        raise ValueError(f"columns of {sorted(lengths)} samples in one message, expected equally many")
    return [Samples(first, np.stack(arrays, axis=1) * scale)]


def _columns(fields: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[int, list[NDArray[np.float64]]]:
    datasets = fields.get("datasets")
    if isinstance(datasets, Mapping):
        chosen = [datasets[_find(name, datasets)] for name in columns]
        if not all(isinstance(one, Mapping) for one in chosen):
            raise ValueError("a dataset that is no object, expected starting_sample_number and data")
        starts = {_whole(one.get("starting_sample_number")) for one in chosen}
        if len(starts) != 1:
            raise ValueError(f"columns that start at the samples {sorted(starts)}, expected one start")
        return starts.pop(), [_numbers(one.get("data")) for one in chosen]
    named = {key: value for key, value in fields.items() if key not in _NOT_COLUMNS}
    return _whole(fields.get("frame_number")), [_numbers(named[_find(name, named)]) for name in columns]


def _find(name: str, named: Mapping[str, Any]) -> str:
    found = [key for key in named if key == name] or [key for key in named if name in str(key)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} columns that match {name!r} among {', '.join(map(str, named))[:200]}, expected one"
        )
    return found[0]


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**40:
        raise ValueError(f"the sample number {str(value)[:40]}, expected a whole one of 0 or more")
    return value


def _numbers(values: Any) -> NDArray[np.float64]:
    if not isinstance(values, list):
        raise ValueError("a column that is no list, expected numbers")
    try:
        array = np.array(values, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError("a column that holds something else than numbers") from error
    if array.ndim != 1:
        raise ValueError(f"a column of {array.ndim} dimensions, expected one number for each sample")
    return array
