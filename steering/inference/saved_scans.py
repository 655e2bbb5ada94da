"""The live images of a run on disk: what every frame left, block by block, from which a predictor goes on.

The image itself is not written: it is the sum of the patches, which are columns of the table as counts and trust are. A
block of rows is written when it has changed, under a new name: what an earlier checkpoint names stays as it was. Rows
only grow and are read whole, so that the thread that predicts neither waits nor knows. Of a scan that is over the image
is written, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.inference.live import LiveImage
from steering.inference.table import BULKY
from steering.ptychography import Refined
from steering.records import Ids
from steering.records.npz import read_arrays, write_arrays
from steering.records.plain import plain, whole

IMAGE = ("light", "weight")
REFINED = ("refined", "refined_labels")


@dataclass
class _Written:
    """Of one scan, what the newest checkpoint names."""

    blocks: dict[int, tuple[tuple[int, int, bool], str]] = field(default_factory=dict)
    """By number: rows, changes and whether patches are there, as they were written; and the file."""
    changes: int = 0
    """Of `Table.changes`, how many are accounted for."""
    touched: dict[int, int] = field(default_factory=dict)
    """How often the rows of each block were set."""
    image: tuple[Any, str] | None = None
    rows: int = 0
    """Of the table, how many have their ids in `ids`."""
    ids: Ids = field(default_factory=Ids)


class SavedScans:
    """Writes the scans of one predictor; for one thread at a time."""

    def __init__(self) -> None:
        self._written: dict[str, _Written] = {}
        self.bytes = 0
        """That were written so far."""

    def write(self, folder: Path, scans: Mapping[str, LiveImage], tag: str) -> list[dict[str, Any]]:
        """Write what has changed since the last call into the folder. tag: begins the names of new files, and no other
        call of this folder has it. Returns, scan by scan, what `restored` needs, in JSON's types. Raises OSError."""
        return [
            self._scan(folder, live, f"{tag}-{number}")
            for number, live in enumerate(scans.values())
            if len(live.frames)
        ]

    def restore(self, folder: Path, saved: Mapping[str, Any], live: LiveImage) -> None:
        """Put what another predictor has written of a scan into its live image, which is new. Its files stand for what
        is in them: `write` names them again.

        Raises OSError, and ValueError for files that do not fit.
        """
        mine = self._written.setdefault(live.scan, _Written())
        rows, size = int(saved["rows"]), int(saved["block_rows"])
        for number, name in enumerate(saved["blocks"]):
            columns = read_arrays(folder / plain_name(name))
            count = min(rows - number * size, size)
            if any(len(values) < count for values in columns.values()) or "frame_id" not in columns:
                raise ValueError(f"{folder / name}: found fewer rows than {count}, expected a block of frames")
            live.frames.restore({name: values[:count] for name, values in columns.items()}, size)
            mine.blocks[number] = ((count, 0, "patch" in columns), str(name))
        arrays = read_arrays(folder / plain_name(saved["image"])) if saved["image"] else {}
        for name in REFINED:
            found = {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}
            if found:
                setattr(live, name, Refined(**{k: v if v.ndim else v.item() for k, v in found.items()}))
        live.refinements, live.refinement = int(saved["refinements"]), str(saved["refinement"])
        live.label_residual, live.concluded = whole(saved["label_residual"]), bool(saved["concluded"])
        if saved["retired"]:
            part = tuple(slice(size) for size in live.canvas.shape)
            for sums, name in zip(live.stitcher.sums, IMAGE, strict=True):
                sums[part] = arrays[name]
            live.stitcher.tiles.edits += 2  # for those who copy what has changed
        if saved["image"]:
            mine.image = ((live.refinements, bool(saved["retired"]), live.concluded), str(saved["image"]))

    def _scan(self, folder: Path, live: LiveImage, tag: str) -> dict[str, Any]:
        mine, table = self._written.setdefault(live.scan, _Written()), live.frames
        for changed in table.changes[mine.changes :]:
            mine.changes += 1
            for block in np.unique(changed // table.block_rows).tolist():
                mine.touched[block] = mine.touched.get(block, 0) + 1
        n, names = len(table), []
        mine.ids.add(table.read("frame_id", rows=slice(mine.rows, n))[0].tolist())
        mine.rows = n
        for block in range(-(-n // table.block_rows)):
            rows = min(n - block * table.block_rows, table.block_rows)
            names.append(self._block(folder, live, mine, block, rows, tag))
        return {
            "scan": live.scan,
            "visit_of": live.visit_of,
            "retired": live.retired,
            "concluded": live.concluded,
            "refinement": live.refinement,
            "refinements": live.refinements,
            "label_residual": plain(live.label_residual),
            "block_rows": table.block_rows,
            "rows": n,
            "ids": [list(each) for each in mine.ids.ranges],
            "blocks": names,
            "image": self._image(folder, live, mine, tag),
        }

    def _block(self, folder: Path, live: LiveImage, mine: _Written, block: int, rows: int, tag: str) -> str:
        columns = live.frames.blocks[block]
        state = (rows, mine.touched.get(block, 0), columns["patch"] is not None)
        before = mine.blocks.get(block)
        if before is not None:
            # Patches that have left memory are there as they were last; a scan that is concluded needs none.
            settled = before[0][0] == rows and not state[2]
            if before[0] == state or (settled and (not live.concluded or before[0][1] == state[1])):
                return before[1]
        start = block * live.frames.block_rows
        there = [name for name, values in columns.items() if values is not None]
        try:
            values = live.frames.read(*there, rows=slice(start, start + rows))
        except KeyError:  # patches or counts have just left memory
            there = [name for name in there if name not in BULKY or columns[name] is not None]
            values = live.frames.read(*there, rows=slice(start, start + rows))
        name = f"{tag}-{block}.npz"
        self.bytes += write_arrays(folder / name, dict(zip(there, values, strict=True)))
        mine.blocks[block] = (state, name)
        return name

    def _image(self, folder: Path, live: LiveImage, mine: _Written, tag: str) -> str | None:
        """The refined object, and of a scan that is over the network's image too."""
        state = (live.refinements, live.retired, live.concluded)
        if mine.image is not None and mine.image[0] == state:
            return mine.image[1]
        arrays: dict[str, NDArray] = {}
        if live.retired:
            part = tuple(slice(size) for size in live.canvas.shape)
            arrays |= {name: sums[part] for name, sums in zip(IMAGE, live.stitcher.sums, strict=True)}
        for name in REFINED:
            refined: Refined | None = getattr(live, name)
            if refined is not None:
                arrays |= {f"{name}.{each}": value for each, value in vars(refined).items()}
        if not arrays:
            return None
        file = f"{tag}-image.npz"
        self.bytes += write_arrays(folder / file, arrays)
        mine.image = (state, file)
        return file


def plain_name(name: Any) -> str:
    """The name of a file of the folder itself. Raises ValueError for anything else."""
    if not isinstance(name, str) or name != Path(name).name or name.startswith("."):
        raise ValueError(f"found the file name {name!r}, expected one in the folder of checkpoints")
    return name
