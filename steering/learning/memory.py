"""A memory: a folder of samples and a model that outlives runs. Runs start from it, and add to it at their end.

DIR/memory.json names the files that belong together and is replaced last, under a lock that dies with its holder: a
reader sees the memory before or after, and two runs that end at the same time are added one after the other. A run adds
the samples of its own scans alone; what it has from the memory is there already. So the order does not matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steering.learning.buffer import BOOKKEEPING
from steering.learning.buffer_file import read_buffer, write_state
from steering.learning.buffer_state import BufferState, merge, thin, without
from steering.learning.checkpoint import copy_training, write_training
from steering.learning.identity import WHOLE
from steering.learning.memory_index import INDEX, PATTERNS, Contents, read_index, write_index
from steering.learning.origin import Origin, own_held_out
from steering.learning.samples import Row, evenly
from steering.learning.samples_file import read_samples, write_held_out
from steering.learning.tensor_file import inside
from steering.learning.training_state import Packed

PATIENCE_S = 600.0
"""How long one waits for another that is writing."""
_HELD_SHARE = 8
"""Held-out frames may take one byte for so many of samples."""
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""A memory may come from a stranger: no link is followed, and no pipe is waited for."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Samples of one scan in a memory."""

    run: str
    scan: str
    samples: int
    offered: int
    """Different samples that it was chosen from, estimated."""
    bytes: int
    begun: float
    """When the scan's first labels came, seconds since 1970."""


class Memory:
    """A memory in a folder. Any number of processes, on any machines that share it, may use it at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()

    def contents(self) -> Contents:
        """What the index says; an empty memory where there is none yet.

        Raises OSError, ValueError for one that is damaged or of another format.
        """
        try:
            return read_index(self.path)
        except FileNotFoundError:
            # A draft was never part of a memory: a writer was killed.
            found = [p.name for p in self._files() if not p.name.startswith(".") and p.suffix != ".part"]
            if not found:
                return Contents()
            if (self.path / INDEX).exists():  # somebody has begun the memory since
                return self.contents()
            raise ValueError(
                f"found {', '.join(found)} without {INDEX} in {self.path}, expected both: half of this memory was "
                "deleted; restore it from a copy, choose another folder, or delete these files to begin anew"
            ) from None

    def origin(self) -> Origin | None:
        """What a run begins with; None where nothing was added yet. Raises as `contents` does."""
        found = self.contents()
        if found.samples is None and found.weights is None:
            return None
        return Origin(
            folder=self.path,
            run=self.path.name,
            buffers=((found.samples,),) if found.samples is not None else (),
            weights=found.weights,
        )

    def add(self, run: str, origin: Origin, version: Mapping[str, Any] | None) -> int:
        """Add the samples of a run's own scans, and its model in place of the one before; returns the samples kept.

        version: description of the model in service. Adding a run again changes nothing, unless it has gone on since.

        Raises OSError, ValueError for a memory that is damaged or of another format, or for samples that do not fit
        those stored, or whose files are damaged or lead elsewhere; nothing is lost then, and nothing is left of it.
        """
        with self._changing() as before, ExitStack() as stack:
            chains = ([inside(origin.folder, name) for name in chain] for chain in origin.buffers)
            own = [
                without(state, {key for key, name in state.scans.items() if name.run != run} | _nameless(state))
                for state in (read_buffer(chain, stack) for chain in chains)
            ]
            # Ranks saw different frames of the same scans: all are known below the lowest of their bounds.
            added = merge([without(state, set(before.removed)) for state in own], "balanced")
            stored = self._state(before, stack)
            state = added if stored is None else _united(stored, added)
            state = self._thinned(state, before.budget_bytes)
            weights = self._copied(origin) if origin.weights is not None else before.weights
            version = version if origin.weights is not None else before.version
            changes = {"version": version, "runs": (*(r for r in before.runs if r != run), run), "weights": weights}
            changes["added"] = {**before.added, run: max(origin.number, before.added.get(run, 0))}
            held_out = {**self._held_out(before), **own_held_out(origin)}
            self._write(before, state, held_out, **changes)
            return len(state)

    def serve(self, packed: Packed, version: Mapping[str, Any], *, instead_of: str | None) -> bool:
        """Have runs begin with this model from now on, and with the same samples as before.

        packed: weights and optimiser as a checkpoint holds them. instead_of: file of the weights that it was compared
        with; where others have come since, nothing is changed, and False is returned. Raises as `add` does.
        """
        with self._changing() as before:
            if before.weights != instead_of:
                return False
            name = self._new_file("weights-")
            write_training(self.path / name, packed)
            write_index(self.path, replace(before, weights=name, version=version))
            return True

    def held_out(self) -> dict[str, dict[int, Row]]:
        """Frames that no run has trained on, by scan (RUN/SCAN) and frame id. Raises as `contents` does."""
        with self.reading():
            return self._held_out(self._whole())

    def held(self) -> list[Held]:
        """The samples by scan, oldest first. Raises as `contents` does."""
        with self.reading(), ExitStack() as stack:
            state = self._state(self._whole(), stack)
            if state is None:
                return []
            width = _sample_bytes(state)
            offered = {int(key): int(seen) for key, seen, _ in state.strata.tolist()}
            found = []
            for key, name in state.scans.items():
                count = int((state.stratum == key).sum())
                found.append(
                    Held(
                        run=name.run,
                        scan=name.scan,
                        samples=count,
                        offered=offered.get(key, count),
                        bytes=count * width,
                        begun=name.begun,
                    )
                )
            return sorted(found, key=lambda one: (one.begun, one.run, one.scan))

    def remove(self, scan: str) -> int:
        """Take a scan out, RUN/SCAN, with every sample of it, also from files that nobody needs any more; returns how
        many there were. It does not come back when its run is added again. Models that learnt from it stay.

        Raises ValueError where no scan, or more than one, is meant; OSError.
        """
        with self._changing() as before, ExitStack() as stack:
            state = self._state(before, stack)
            names = {} if state is None else state.scans
            run, _, name = scan.rpartition("/")
            meant = {
                key: one
                for key, one in names.items()
                if one.scan == name and (one.run == run or _short(one.run) == run)
            }
            if len(meant) != 1 or state is None:
                known = ", ".join(f"{one.run}/{one.scan}" for one in (meant or names).values()) or "none at all"
                raise ValueError(f"found {len(meant)} scans {scan!r} in {self.path}, expected one of: {known}")
            left = without(state, set(meant))
            self._write(before, left, self._held_out(before), removed=(*before.removed, *meant))
            return len(state) - len(left)

    def keep(self, budget_bytes: int) -> int:
        """Keep so many bytes of samples from now on; returns the samples left. Raises as `add` does."""
        with self._changing() as before, ExitStack() as stack:
            state = self._state(before, stack)
            thinned = None if state is None else self._thinned(state, budget_bytes)
            self._write(before, thinned, self._held_out(before), budget_bytes=budget_bytes)
            return 0 if thinned is None else len(thinned)

    def _state(self, contents: Contents, stack: ExitStack) -> BufferState | None:
        return None if contents.samples is None else read_buffer([self.path / contents.samples], stack)

    def _thinned(self, state: BufferState, budget: int) -> BufferState:
        capacity = max(1, budget // _sample_bytes(state)) if state.layout is not None else 0
        return thin(replace(state, policy="reservoir"), capacity)

    def _held_out(self, contents: Contents) -> dict[str, dict[int, Row]]:
        if contents.held_out is None:
            return {}
        scans = read_samples(self.path / contents.held_out).scans
        return {name: scan.held_out for name, scan in scans.items()}

    def _write(
        self, before: Contents, state: BufferState | None, held_out: dict[str, dict[int, Row]], **changes: Any
    ) -> None:
        """Write samples and held-out frames, then the index in one step."""
        after, samples, held = replace(before, **changes), None, None
        if state is not None and len(state):
            samples = self._new_file("samples-")
            write_state(state, self.path / samples)
        left = {
            name: rows
            for name, rows in held_out.items()
            if rows and int(next(iter(rows.values()))["stratum"]) not in after.removed
        }
        if left:
            held = self._new_file("held-out-")
            write_held_out(evenly(left, after.budget_bytes // _HELD_SHARE), self.path / held)
        write_index(self.path, replace(after, samples=samples, held_out=held))

    def _copied(self, origin: Origin) -> str:
        name = self._new_file("weights-")
        copy_training(inside(origin.folder, str(origin.weights)), self.path / name)
        return name

    def _new_file(self, kind: str) -> str:
        """A name for a file that is about to be written. There is an index before there is any file: files without one
        are what is left of a memory that was deleted in part."""
        if not (self.path / INDEX).exists():
            write_index(self.path, Contents())
        return f"{kind}{secrets.token_hex(8)}.safetensors"

    def _files(self) -> list[Path]:
        """Files in the folder that are a memory's by their names."""
        return [path for path in self.path.glob("*") if path.name.startswith((*PATTERNS, f".{INDEX}."))]

    def _whole(self) -> Contents:
        """What the index says, under a lock. Raises as `contents` does, and ValueError where a file of it is gone."""
        found = self.contents()
        gone = [name for name in sorted(found.files) if not os.path.lexists(self.path / name)]
        if gone:
            raise ValueError(
                f"found no {', '.join(gone)} in {self.path}, expected it as {INDEX} says: half of this memory was "
                "deleted; restore it from a copy, or choose another folder"
            )
        return found

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Contents]:
        """Hold the memory alone to change it; what it holds before that. Files that no index names are removed before,
        as a killed writer may have filled the disk with them, and after, also where the change has failed."""
        with self._locked():
            before = self._whole()
            self._tidy()
            try:
                yield before
            except BaseException:
                with contextlib.suppress(OSError, ValueError):
                    self._tidy()
                raise
            self._tidy()

    def _tidy(self) -> None:
        needed = self.contents().files
        for path in self._files():
            if path.name not in needed:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep files from being removed while a run starts from them."""
        try:
            handle = os.open(self.path / ".lock", os.O_RDONLY | _OPEN)
        except OSError:  # nothing was ever added, or nobody can
            yield
            return
        try:
            self._lock(handle, fcntl.LOCK_SH)
            yield
        finally:
            os.close(handle)

    def check_writable(self) -> None:
        """Raise OSError where a run could not add to it at its end, with what to do."""
        with self._locked():
            pass

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the memory alone. The lock is the system's: it goes with its holder, however that ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | _OPEN, 0o666)
        except OSError as error:
            raise type(error)(
                error.errno,
                f"{self.path}: found a memory that cannot be written ({os.strerror(error.errno or 0)}), expected "
                "permission and a file system that can be written: nothing was changed; choose another folder, or "
                "start with --from instead",
            ) from error
        try:
            self._lock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _lock(self, handle: int, kind: int) -> None:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(
                        f"{self.path}: found a memory that another process has held for {PATIENCE_S:.0f} s, expected "
                        "it free: end that process (fuser names it), and try again"
                    ) from None
                time.sleep(0.05)


def _united(stored: BufferState, added: BufferState) -> BufferState:
    """Both, each stratum with what is known of it."""
    return merge([replace(stored, policy="balanced", bound=WHOLE), replace(added, bound=WHOLE)], "balanced")


def _nameless(state: BufferState) -> set[int]:
    return set(state.strata[:, 0].tolist()) - set(state.scans)


def _sample_bytes(state: BufferState) -> int:
    return (sum(state.layout.row_bytes.values()) if state.layout is not None else 0) + BOOKKEEPING


def _short(run: str) -> str:
    """The name of a run's folder, without the random part of its identity."""
    return run.rpartition("-")[0]


def memories(folders: Sequence[Path]) -> list[Memory]:
    """The memories among these folders and directly below them."""
    found = [inside for folder in folders for inside in (folder, *sorted(folder.glob("*/")))]
    return [Memory(folder) for folder in found if (folder / INDEX).is_file()]
