"""The settings of a run as they were in the end, for people and other programs: RUN/settings.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder

FILE = "settings.json"
_LISTED = 100
"""Of longer lists only the length is kept."""
_DEEP = 6


def note_settings(experiment: Experiment, folder: RunFolder) -> None:
    """Write them into the run's folder. Raises OSError."""
    folder.write_file(FILE, json.dumps(resolved(experiment), indent=1, allow_nan=False).encode())


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Every field of an experiment in JSON's types, defaults and what follows from other parts included. Objects are
    named by their class and what they say of themselves in numbers and words, arrays by dtype and shape."""
    found = {each.name: _readable(getattr(experiment, each.name)) for each in fields(experiment)}
    network = {"kind": type(experiment.network).__name__, **_readable(experiment.network.hyperparameters)}
    return {**found, "network": network, "campaign": _readable(experiment.safe_campaign)}


def _readable(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic):
        return _readable(value.item(), depth)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {value.shape}"
    if depth < _DEEP and isinstance(value, Mapping) and len(value) <= _LISTED:
        return {str(key): _readable(each, depth + 1) for key, each in value.items()}
    if depth < _DEEP and isinstance(value, tuple | list | set | frozenset) and len(value) <= _LISTED:
        return [_readable(each, depth + 1) for each in value]
    if depth < _DEEP and is_dataclass(value) and not isinstance(value, type):
        own = {each.name: _readable(getattr(value, each.name, None), depth + 1) for each in fields(value)}
        return {"kind": type(value).__name__, **own}
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    if isinstance(value, Mapping | tuple | list | set | frozenset):
        return f"{kind} of {len(value)}"
    said = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    own = {name: each for name, each in said.items() if isinstance(each, bool | int | float | str) and name[0] != "_"}
    return {"kind": kind, **_readable(own, depth + 1)} if own else kind
