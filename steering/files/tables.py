"""Text files of positions, as some beamlines write them beside their frames, and as people make them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steering.files.bounds import read_bytes
from steering.files.layouts import TABLES, Table
from steering.files.units import factor

_MOST_BYTES = 2**28
_MOST_COLUMNS = 200


class TextTable:
    """A table of numbers: `names` of its columns, empty where it has none, and `rows` (n, column)."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for what is no such table, OSError."""
        self.name = path.name
        try:
            text = read_bytes(path, most_bytes=_MOST_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"found {path.name} that is neither HDF5 nor text, expected positions in it") from error
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        delimiter = "," if lines and "," in lines[-1] else None
        first = next((k for k, line in enumerate(lines) if _numeric(line.split(delimiter))), len(lines))
        if first == len(lines) or len(lines[first].split(delimiter)) > _MOST_COLUMNS:
            raise ValueError(f"found no rows of numbers in {path.name}, expected positions in columns")
        named = lines[first - 1].split(delimiter) if first else []
        try:
            self.rows: NDArray[np.float64] = np.loadtxt(
                io.StringIO("\n".join(lines[first:])), np.float64, delimiter=delimiter, ndmin=2, comments=None
            )
        except ValueError as error:
            raise ValueError(
                f"found rows of {path.name} that are not as many numbers as the others ({error}), expected a table"
            ) from error
        self.names = [name.strip() for name in named] if len(named) == self.rows.shape[1] else []

    def column(self, key: str | int) -> NDArray[np.float64]:
        """(n,) by its name, or by its number from 0. Raises ValueError where it is not there."""
        if isinstance(key, str) and key in self.names:
            return self.rows[:, self.names.index(key)]
        if (isinstance(key, int) or key.isdigit()) and int(key) < self.rows.shape[1]:
            return self.rows[:, int(key)]
        listed = ", ".join(self.names) or f"{self.rows.shape[1]} columns without names"
        raise ValueError(f"found no column {key} in {self.name} ({listed}), expected it there")

    def known(self) -> Table | None:
        """The kind of table that it is, where it is one of those that beamlines write."""
        for one in TABLES:
            if all(name in self.names for name in one.header) if one.header else self._fits(one):
                return one
        return None

    def _fits(self, one: Table) -> bool:
        if self.names or self.rows.shape[1] != one.columns:
            return False
        numbers = self.column(one.frame)
        return bool((numbers == np.rint(numbers)).all() and (np.diff(numbers) >= 0).all())


def table_positions(path: Path, frames: int, unit: str | None = None) -> tuple[NDArray[np.float64], str, str]:
    """(frame, 2) of (y, x) in metres from a table that a beamline has written, words on what was recognised, and the
    unit in which they were.

    frames: how many there are. unit: None for the one that such tables have. Rows with one number of a frame are
    averaged. Raises ValueError for another table, and for one that has not a position for each frame.
    """
    table = TextTable(path)
    kind = table.known()
    if kind is None:
        raise ValueError(
            f"found {path.name} with {', '.join(table.names) or f'{table.rows.shape[1]} columns'}, which is no table "
            "that is known here: say which columns and their unit, as FILE:/x,/y[um], or by number as FILE:/1,/2[um]"
        )
    numbers, index = np.unique(table.column(kind.frame), return_inverse=True)
    rows = np.bincount(index)
    unit = kind.unit if unit is None else unit
    scale = factor(unit, "length", path.name)
    where = [np.bincount(index, table.column(key)) / rows * sign * scale for key, sign in
             zip((kind.y, kind.x), kind.signs, strict=True)]  # fmt: skip
    if len(numbers) != frames or (np.diff(numbers) != 1).any():
        raise ValueError(
            f"found positions of {len(numbers)} frames, {numbers[0]:g} to {numbers[-1]:g}, in {path.name}, which is "
            f"{kind.name}, and {frames} frames, expected one for each: leave out what has no partner, and give "
            "FILE:/x,/y[unit]"
        )
    each = f", {len(table.rows) / frames:.3g} rows of each frame are averaged" if len(table.rows) > frames else ""
    return np.stack(where, axis=1), f"{path.name} ({kind.name}, {unit}{each})", unit


def table_count(path: Path, *, named: bool) -> int:
    """Of how many frames a table has positions. named: a row each, as its columns are named; else it is a known one.

    Raises ValueError for what is no table.
    """
    table = TextTable(path)
    kind = None if named else table.known()
    return len(table.rows) if kind is None else len(np.unique(table.column(kind.frame)))


def _numeric(fields: list[str]) -> bool:
    try:
        return len([float(field) for field in fields if field.strip()]) >= 2
    except ValueError:
        return False
