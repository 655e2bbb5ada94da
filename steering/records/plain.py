"""Values as plain JSON and back, without pickle: reading makes only records that the caller names, and runs no code."""

from __future__ import annotations

import base64
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

_TAG = "~"
"""The one key of an object that stands for something JSON has no word for: its kind; the value stands under `v`."""


def plain(value: Any) -> Any:
    """The value in JSON's own types, so that `whole` makes an equal one of it.

    Understood are None, booleans, numbers, text, lists, tuples, sets, deques, mappings, numpy arrays of numbers,
    classes, and dataclasses of these. Raises TypeError for anything else.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _tagged("float", str(value))
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return _tagged("array", [value.dtype.str, list(value.shape), content])
    if isinstance(value, type):
        return _tagged("class", value.__name__)
    if is_dataclass(value):
        found = {each.name: plain(getattr(value, each.name)) for each in fields(value)}
        return _tagged("record", [type(value).__name__, found])
    return _tagged(*_collection(value))


def whole(data: Any, records: Iterable[type] = ()) -> Any:
    """What `plain` was given. records: the classes and dataclasses that may stand in it.

    Raises ValueError for anything that `plain` does not write.
    """
    try:
        return _whole(data, {each.__name__: each for each in records})
    except RecursionError as error:
        raise ValueError("found values nested without end, expected what steering writes") from error


def _tagged(kind: str, value: Any) -> dict[str, Any]:
    return {_TAG: kind, "v": value}


def _collection(value: Any) -> tuple[str, Any]:
    match value:
        case tuple():
            return "tuple", [plain(each) for each in value]
        case set() | frozenset():
            return "set", [plain(each) for each in sorted(value, key=str)]
        case deque():
            return "deque", [value.maxlen, [plain(each) for each in value]]
        case Counter():
            return "counter", _pairs(value)
        case defaultdict():
            return "map", _pairs(value)
        case dict():
            return "map", _pairs(value)
    raise TypeError(f"found a {type(value).__name__}, expected numbers, text, arrays, and collections of them")


def _pairs(value: Mapping[Any, Any]) -> list[list[Any]]:
    return [[plain(key), plain(each)] for key, each in value.items()]


def _whole(data: Any, records: Mapping[str, type]) -> Any:
    if isinstance(data, list):
        return [_whole(each, records) for each in data]
    if not isinstance(data, dict):
        return data
    try:
        return _untagged(str(data[_TAG]), data["v"], records)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"found {str(data)[:200]} ({error}), expected what steering writes") from error


def _untagged(kind: str, value: Any, records: Mapping[str, type]) -> Any:
    match kind:
        case "float":
            return float(value)
        case "tuple":
            return tuple(_whole(each, records) for each in value)
        case "set":
            return {_whole(each, records) for each in value}
        case "deque":
            return deque((_whole(each, records) for each in value[1]), maxlen=value[0])
        case "counter" | "map":
            pairs = {_whole(key, records): _whole(each, records) for key, each in value}
            return Counter(pairs) if kind == "counter" else pairs
        case "array":
            dtype, shape, content = value
            if np.dtype(dtype).kind not in "biufc":
                raise ValueError(f"an array of {dtype}")
            return np.frombuffer(base64.b64decode(content), np.dtype(dtype)).reshape(shape).copy()
        case "class":
            return records[value]
        case "record":
            name, found = value
            return records[name](**{key: _whole(each, records) for key, each in found.items()})
    raise ValueError(f"the kind {kind!r}")
