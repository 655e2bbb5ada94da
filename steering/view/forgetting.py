"""What a run's network forgot and what it learnt ahead: the error of each scan by version, from summary.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steering.view.page import shades
from steering.view.tables import number


@dataclass(frozen=True)
class Forgetting:
    """Validation errors of the network alone, on labelled frames that it was never trained on."""

    versions: Sequence[int]
    errors: Mapping[str, Sequence[float | None]]
    """By scan, in order: of each of the versions."""
    own_end: Mapping[str, int]
    """By scan: the version in service at its last frame."""


def forgetting(summary: Mapping[str, Any]) -> Forgetting | None:
    """Of summary.json; None where nothing was judged."""
    found = summary.get("forgetting") or {}
    errors = found.get("errors")
    if not errors:  # or of an older version of steering
        return None
    order = [scan for scan in summary.get("scans") or [] if scan in errors]
    return Forgetting(found["versions"], {scan: errors[scan] for scan in order}, found["own_end"])


def matrix(found: Forgetting, largest: float | None = None) -> str:
    """The errors as a table of HTML: a row for each scan, a column for each version. Darker is worse, on a scale from 0
    to `largest`, by default the largest error of the table; outlined: at the end of the scan itself."""
    most = largest or largest_error([found])
    rows = [
        (
            scan,
            [
                (number(e, ".3f"), None if e is None else min(e / most, 1.0), v == found.own_end.get(scan))
                for v, e in zip(found.versions, errors, strict=True)
            ],
        )
        for scan, errors in found.errors.items()
    ]
    return shades(["", *(f"v{version}" for version in found.versions)], rows)


def largest_error(several: Iterable[Forgetting]) -> float:
    """The largest error of several runs."""
    known = [e for found in several for errors in found.errors.values() for e in errors if e is not None]
    return max(known, default=0.0) or 1.0
