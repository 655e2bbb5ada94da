"""The manifest of a checkpoint: it is written last, and a checkpoint is what its manifest names, whole or not at all.

RUN/checkpoints holds a folder for each checkpoint, by its number, with the manifest and the parts that change as a
whole; files that later checkpoints share with it stand beside these folders. Everything is JSON, .npz or safetensors:
reading executes no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.files import read_bytes
from steering.learning.checkpoint import FOLDER as RANKS, RanksPart, prune as prune_ranks
from steering.records.whole_file import sync_folder, write_whole
from steering.runner.folder import RunFolder

logger = logging.getLogger(__name__)

FORMAT = "steering-checkpoint 1"
MANIFEST = "manifest.json"
LAST = "ranks.json"
"""The ranks' part of a checkpoint, in its folder; of the last one, written when a run has ended, beside all of them."""
_MOST_BYTES = 2**30
"""Of a part in JSON: a larger one is none of ours."""
_MOST_RANKS_BYTES = 64 * 2**20


class NoCheckpoint(RuntimeError):
    """There is no checkpoint that can be used."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What belongs to a checkpoint."""

    number: int
    event: int
    """Number of the last event that every part includes."""
    time: float
    """When its first part was taken, seconds since the epoch."""
    parts: Mapping[str, str]
    """SHA-256 of each JSON part, by its name: NUMBER/NAME.json."""
    files: Mapping[str, int]
    """Bytes of every other file, by its name below RUN/checkpoints."""
    bytes: int
    """Written for this checkpoint."""


def checkpoints(folder: RunFolder) -> Path:
    """Where the checkpoints of a run are."""
    return folder.path / "checkpoints"


def write_part(root: Path, number: int, name: str, content: Any) -> tuple[str, int]:
    """Write a part in JSON; its SHA-256 and its bytes. Raises OSError."""
    data = json.dumps(content, allow_nan=False).encode()
    place = root / str(number)
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / f"{name}.json", data, durable=True)
    return hashlib.sha256(data).hexdigest(), len(data)


def commit(root: Path, manifest: Manifest) -> None:
    """Write the manifest: from here on the checkpoint is there. Raises OSError."""
    content = {"format": FORMAT, **vars(manifest)}
    write_whole(
        root / str(manifest.number) / MANIFEST, json.dumps(content, indent=1, allow_nan=False).encode(), durable=True
    )
    sync_folder(root)


def read_part(root: Path, manifest: Manifest, name: str) -> Any:
    """A part in JSON. Raises ValueError where it is not what the manifest names, OSError where it is not there."""
    path = root / str(manifest.number) / f"{name}.json"
    data = read_bytes(path, most_bytes=_MOST_BYTES, root=root)
    if hashlib.sha256(data).hexdigest() != manifest.parts.get(name):
        raise ValueError(f"{path}: found other content than its manifest names, expected the part as it was written")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{path}: found {error}, expected the part as it was written") from error


def read_ranks(root: Path, place: Path) -> RanksPart | None:
    """The ranks' part in a file below the folder of all checkpoints; None where it says that there is none.

    Raises OSError, ValueError for a file that is damaged or leads elsewhere.
    """
    data = read_bytes(place, most_bytes=_MOST_RANKS_BYTES, root=root)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found {place} damaged ({error}), expected the ranks' part of a checkpoint") from None
    return None if content is None else RanksPart.from_json(content)


def newest_whole(folder: RunFolder) -> tuple[Manifest, list[str]]:
    """The newest checkpoint of which everything is there, and what is to be said of newer ones.

    Raises NoCheckpoint where there is none, ValueError for the newest one where it is of another format.
    """
    root, remarks = checkpoints(folder), list[str]()
    for number in reversed(written(root)):
        try:
            manifest = _manifest(root, number)
            _refuse_damaged(root, manifest)
            return manifest, remarks
        except (OSError, _Damaged) as error:
            remarks.append(f"checkpoint {number} cannot be used: {error}")
    raise NoCheckpoint(
        f"{folder.name}: found no checkpoint{': ' if remarks else ''}{'; '.join(remarks)}, expected one in {root}: "
        "start a new run (Experiment.checkpoint_s says how often checkpoints are written)"
    )


def newest_number(folder: RunFolder) -> int:
    """Of the newest checkpoint, whole or not; 0 for none."""
    return max((int(p.name) for p in checkpoints(folder).glob("[0-9]*") if p.name.isdecimal()), default=0)


def any_whole(folder: RunFolder) -> bool:
    """Whether there is a checkpoint that was written to its end, as far as its files' names say."""
    return bool(written(checkpoints(folder)))


def written(root: Path) -> list[int]:
    """Numbers of those with a manifest, which is written last, in order."""
    return sorted(int(p.parent.name) for p in root.glob(f"[0-9]*/{MANIFEST}") if p.parent.name.isdecimal())


def prune(root: Path, keep: int) -> None:
    """Keep the newest checkpoints and the files that they or the ranks' last part name; `keep`: how many. What cannot
    be removed stays."""
    numbers = written(root)
    kept, needed, parts = numbers[-keep:], set[str](), list[RanksPart]()
    try:
        for number in kept:
            manifest = _manifest(root, number)
            needed |= set(manifest.files)
            parts += _of_ranks(root, str(number)) if "ranks" in manifest.parts else []
        parts += _of_ranks(root, "") if (root / LAST).is_file() else []
    except (OSError, ValueError) as error:
        logger.warning("%s: nothing is removed: %s", root, error)
        return
    for place in root.iterdir():
        if place.name.isdecimal() and kept and int(place.name) < kept[0]:
            (place / MANIFEST).unlink(missing_ok=True)  # first: a checkpoint is whole or not there
            shutil.rmtree(place, ignore_errors=True)
    for path in _shared(root, kept):
        if str(path.relative_to(root)) not in needed:
            path.unlink(missing_ok=True)
    prune_ranks(root, parts)


def _of_ranks(root: Path, number: str) -> list[RanksPart]:
    part = read_ranks(root, root / number / LAST)
    return [] if part is None else [part]


def _shared(root: Path, kept: Iterable[int]) -> list[Path]:
    """Files that predictors have written, older than the newest checkpoint: what is newer belongs to the next one.
    Ranks write theirs out of turn too, at the end of a job or of the run: those go by their numbers."""
    newest = max((os.stat(root / str(number) / MANIFEST).st_mtime for number in kept), default=0.0)
    others = {"spool", RANKS}
    places = [
        p for p in root.iterdir() if p.is_dir() and not (p.is_symlink() or p.name.isdecimal() or p.name in others)
    ]
    return [path for place in places for path in place.iterdir() if path.is_file() and path.stat().st_mtime < newest]


class _Damaged(ValueError):
    """A checkpoint of which something lacks."""


def _manifest(root: Path, number: int) -> Manifest:
    path = root / str(number) / MANIFEST
    try:
        content = json.loads(read_bytes(path, most_bytes=_MOST_BYTES, root=root))
        found = content.pop("format", None)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{path}: found no manifest ({error}), expected one") from error
    if found != FORMAT:
        raise ValueError(
            f"{path}: found a checkpoint of format {found!r}, expected {FORMAT!r}: recover the run with the version of "
            "steering that wrote it"
        )
    try:
        manifest = Manifest(**content)
        if manifest.number != number or not all(_plain(name) for name in manifest.files):
            raise TypeError("names that lead elsewhere")
        return manifest
    except (TypeError, AttributeError) as error:
        raise _Damaged(f"{path}: found {error}, expected a manifest") from error


def _plain(name: str) -> bool:
    parts = Path(name).parts
    return not Path(name).is_absolute() and len(parts) in (1, 2, 3) and not any(part.startswith(".") for part in parts)


def _refuse_damaged(root: Path, manifest: Manifest) -> None:
    inside = root.resolve()
    for name, size in manifest.files.items():
        path = root / name
        if not path.is_file() or path.stat().st_size != size or not path.resolve().is_relative_to(inside):
            raise _Damaged(f"{path}: found no such file of {size} bytes, expected it")
    for name in manifest.parts:
        try:
            read_part(root, manifest, name)
        except ValueError as error:
            raise _Damaged(str(error)) from error
