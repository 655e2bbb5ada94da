"""The index of a memory: which files belong together, and what was put into it. It is replaced as a whole."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.files import read_bytes
from steering.records.whole_file import write_whole

FORMAT = "steering-memory 1"
INDEX = "memory.json"
BUDGET = 4 * 2**30
"""Bytes of samples that a new memory keeps."""
PATTERNS = ("samples-", "weights-", "held-out-")
"""With which the names of a memory's files begin."""
_MOST_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the index of a memory says."""

    budget_bytes: int = BUDGET
    samples: str | None = None
    """File of the samples; None: there are none."""
    held_out: str | None = None
    """File of frames that no run has trained on, by which models are judged; None: there are none."""
    weights: str | None = None
    """File of model and optimiser, of the run that ended last."""
    version: Mapping[str, Any] | None = None
    """Description of that model, see ModelVersion."""
    runs: tuple[str, ...] = ()
    """That were added, oldest first."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Of each run, the number of its checkpoint that was added: one that goes on after that has more to give."""
    removed: tuple[int, ...] = ()
    """Strata that were taken out and do not come back."""

    @property
    def files(self) -> set[str]:
        """All that belong to it."""
        return {name for name in (self.samples, self.held_out, self.weights) if name is not None}


def read_index(folder: Path) -> Contents:
    """What the index in a folder says. Raises FileNotFoundError where there is none, OSError, ValueError for one that
    is damaged or of another format."""
    return _contents(read_bytes(folder / INDEX, most_bytes=_MOST_BYTES, root=folder), folder / INDEX)


def write_index(folder: Path, contents: Contents) -> None:
    """Write it; it is on the disk when this returns.

    Raises OSError, and ValueError for more than `read_index` takes, as a run from a stranger may bring; what was there
    stays then.
    """
    data = json.dumps({"format": FORMAT, "written": time.time(), **vars(contents)}, indent=1).encode()
    if len(data) > _MOST_BYTES:
        raise ValueError(
            f"found {len(data):,} bytes that {folder / INDEX} would have, expected {_MOST_BYTES:,} at most: look at "
            "the names and at the description of the model that the run brings"
        )
    write_whole(folder / INDEX, data, durable=True)


def _contents(data: bytes, path: Path) -> Contents:
    try:
        found = json.loads(data)
        if found.get("format") != FORMAT:
            raise ValueError(
                f"found {path} of format {str(found.get('format'))[:50]!r}, expected {FORMAT!r}: use the version of "
                "steering that wrote it, or another folder"
            )
        names = [found["samples"], found["weights"], found.get("held_out")]
        version, removed, runs, added = found["version"], found["removed"], found["runs"], found.get("added", {})
        fits = all(n is None or (isinstance(n, str) and n.startswith(PATTERNS) and "/" not in n) for n in names)
        fits = fits and type(found["budget_bytes"]) is int and found["budget_bytes"] > 0
        fits = fits and (version is None or isinstance(version, dict)) and all(type(key) is int for key in removed)
        fits = fits and all(type(number) is int for number in added.values())
        if not fits or not all(isinstance(run, str) for run in runs):
            raise TypeError("names or numbers that are none")
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"found {path} damaged ({type(error).__name__}: {str(error)[:100]}), expected the index of a memory: "
            "restore it from a copy, or choose another folder"
        ) from None
    return Contents(
        budget_bytes=found["budget_bytes"],
        samples=names[0],
        weights=names[1],
        held_out=names[2],
        version=version,
        runs=tuple(runs),
        added=added,
        removed=tuple(removed),
    )
