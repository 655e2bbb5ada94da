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
            text = read_bytes(path, most_bytes=_MOST_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"found {path.name} that is neither HDF5 nor text, expected positions in it") from error
        written = [line.strip() for line in text.splitlines() if line.strip()]
        lines = [line for line in written if not line.startswith("#")]
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
        self.names = _fitting(named, self.rows.shape[1])
        self.titled = bool(self.names)
        """Its columns have names in a row of their own, and not in a comment above them, as numpy.savetxt writes."""
        if not self.titled and (above := written[: written.index(lines[first])]):
            self.names = _fitting(above[-1].lstrip("# ").split(delimiter), self.rows.shape[1])

    def column(self, key: str | int) -> NDArray[np.float64]:
        """(n,) by its name, or by its number from 0. Raises ValueError where it is not there."""
        return self.rows[:, self.index(key)]

    def index(self, key: str | int) -> int:
        """Which column has a name or a number from 0. Raises ValueError where it is not there."""
        if isinstance(key, str) and key in self.names:
            return self.names.index(key)
        if (isinstance(key, int) or key.isdigit()) and int(key) < self.rows.shape[1]:
            return int(key)
        listed = ", ".join(self.names) or f"{self.rows.shape[1]} columns without names"
        raise ValueError(f"found no column {key} in {self.name} ({listed}), expected it there")

    def known(self) -> Table | None:
        """The kind of table that it is, where it is one of those that beamlines write."""
        for one in TABLES:
            if all(name in self.names for name in one.header) if one.header else self._fits(one):
                return one
        return None

    def _fits(self, one: Table) -> bool:
        if self.titled or self.rows.shape[1] < one.columns:
            return False
        numbers = self.column(one.frame)
        return bool((numbers == np.rint(numbers)).all() and (np.diff(numbers) >= 0).all())


def table_positions(path: Path, frames: int, unit: str | None = None) -> tuple[NDArray[np.float64], str, str, Table]:
    """(frame, 2) of (y, x) in metres from a table that a beamline has written, words on what was recognised, the unit
    in which they were, and the kind of table.

    frames: how many there are. unit: None for the one that such tables have. Rows with one number of a frame are
    averaged. Raises ValueError for another table, and for one that has not a position for each frame.
    """
    table = TextTable(path)
    kind = table.known()
    if kind is None:
        raise ValueError(
            f"found {path.name} with {', '.join(table.names) or f'{table.rows.shape[1]} columns'}, which is no table "
            "that is known here: say which columns, x first, and their unit, as FILE:/x,/y[um], or by number as "
            "FILE:/1,/2[um]"
        )
    unit = kind.unit if unit is None else unit
    numbers, where = _of_each_frame(table, kind)
    if len(numbers) != frames or (np.diff(numbers) != 1).any():
        raise ValueError(
            f"found positions of {len(numbers)} frames, {numbers[0]:g} to {numbers[-1]:g}, in {path.name}, which is "
            f"{kind.name}, and {frames} frames, expected one for each: leave out what has no partner, in the table or "
            f"of the frames, and give {path.name}:/{kind.x},/{kind.y}[{unit}], which takes the rows as they are left"
        )
    each = f", {len(table.rows) / frames:.3g} rows of each frame are averaged" if len(table.rows) > frames else ""
    return where * factor(unit, "length", path.name), f"{path.name} ({kind.name}, {unit}{each})", unit, kind


def named_columns(
    path: Path, names: tuple[str, ...], unit: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], Table | None, str]:
    """x and y in metres from two columns of a table, its kind where that is known, and words on what was taken.

    names: of x, of y, or their numbers from 0. The columns in which a known table has positions keep their signs, and
    where both are such, rows of one frame are averaged. Raises ValueError for columns that are not there.
    """
    table, scale = TextTable(path), factor(unit, "length", path.name)
    at = [table.index(name) for name in names]
    kind = table.known()
    if kind is None:
        return table.rows[:, at[0]] * scale, table.rows[:, at[1]] * scale, None, ""
    own = {table.index(key): axis for axis, key in enumerate((kind.y, kind.x))}
    others = [name for name, column in zip(names, at, strict=True) if column not in own]
    if others:
        x, y = (table.rows[:, c] * (kind.signs[own[c]] if c in own else 1) for c in at)
    else:
        where = _of_each_frame(table, kind)[1]
        x, y = (where[:, own[c]] for c in at)
    note = f"{path.name} is {kind.name}: its own columns have their signs, {kind.signs} in y and x"
    note += f"; {' and '.join(others)}, which are others, are taken as they stand" if others else ""
    return x * scale, y * scale, kind, note


def table_count(path: Path, names: tuple[str, ...] = ()) -> int:
    """Of how many frames a table has positions. names: of its columns, where they are given: a row each, unless they
    are those of a known table.

    Raises ValueError for what is no table.
    """
    table = TextTable(path)
    kind = table.known()
    if kind is None or not {table.index(name) for name in names} <= {table.index(kind.y), table.index(kind.x)}:
        return len(table.rows)
    return len(np.unique(table.column(kind.frame)))


def _of_each_frame(table: TextTable, kind: Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Numbers of the frames, rising, and positions (frame, 2) of (y, x) with their signs, in the table's unit."""
    numbers, index = np.unique(table.column(kind.frame), return_inverse=True)
    rows = np.bincount(index)
    sums = [np.bincount(index, table.column(key)) * sign for key, sign in
            zip((kind.y, kind.x), kind.signs, strict=True)]  # fmt: skip
    return numbers, np.stack(sums, axis=1) / rows[:, None]


def _fitting(names: list[str], columns: int) -> list[str]:
    return [name.strip() for name in names] if len(names) == columns and not _numeric(names) else []


def _numeric(fields: list[str]) -> bool:
    try:
        return len([float(field) for field in fields if field.strip()]) >= 2
    except ValueError:
        return False
