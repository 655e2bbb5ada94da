"""A memory: a folder of samples and a model that outlives runs. Runs start from it, and add to it at their end.

DIR/memory.json names the files that belong together and is replaced last, under a lock that dies with its holder: a
reader sees the memory before or after, and two runs that end at the same time are added one after the other. A run adds
the samples of its own scans alone; what it has from the memory is there already. So the order does not matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
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
from steering.learning.checkpoint import write_training
from steering.learning.identity import WHOLE
from steering.learning.origin import Origin, own_held_out
from steering.learning.samples import Row, evenly
from steering.learning.samples_file import read_samples, write_held_out
from steering.learning.training_state import Packed
from steering.records.whole_file import write_whole

FORMAT = "steering-memory 1"
INDEX = "memory.json"
BUDGET = 4 * 2**30
"""Bytes of samples that a new memory keeps."""
PATIENCE_S = 600.0
"""How long one waits for another that is writing."""
_MOST_INDEX = 16 * 2**20
_PATTERNS = ("samples-", "weights-", "held-out-")
_HELD_SHARE = 8
"""Held-out frames may take one byte for so many of samples."""


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
    removed: tuple[int, ...] = ()
    """Strata that were taken out and do not come back."""


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
        path = self.path / INDEX
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                data = file.read(_MOST_INDEX + 1)
        except FileNotFoundError:
            self._refuse_half()
            return Contents()
        return _contents(data, path)

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

        version: description of the model in service. Adding a run again changes nothing.

        Raises OSError, ValueError for a memory that is damaged or of another format, or for samples that do not fit
        those stored; nothing is lost then.
        """
        with self._locked(), ExitStack() as stack:
            before = self.contents()
            own = [
                without(state, {key for key, name in state.scans.items() if name.run != run} | _nameless(state))
                for state in (read_buffer([origin.folder / name for name in chain], stack) for chain in origin.buffers)
            ]
            # Ranks saw different frames of the same scans: all are known below the lowest of their bounds.
            added = merge([without(state, set(before.removed)) for state in own], "balanced")
            stored = self._state(before, stack)
            state = added if stored is None else _united(stored, added)
            state = self._thinned(state, before.budget_bytes)
            weights = self._copied(origin) if origin.weights is not None else before.weights
            version = version if origin.weights is not None else before.version
            changes = {"version": version, "runs": (*(r for r in before.runs if r != run), run), "weights": weights}
            held_out = {**self._held_out(before), **own_held_out(origin)}
            self._write(before, state, held_out, **changes)
            return len(state)

    def serve(self, packed: Packed, version: Mapping[str, Any], *, instead_of: str | None) -> bool:
        """Have runs begin with this model from now on, and with the same samples as before.

        packed: weights and optimiser as a checkpoint holds them. instead_of: file of the weights that it was compared
        with; where others have come since, nothing is changed, and False is returned. Raises as `add` does.
        """
        with self._locked():
            before = self.contents()
            if before.weights != instead_of:
                return False
            name = f"weights-{secrets.token_hex(8)}.safetensors"
            write_training(self.path / name, packed)
            self._become(replace(before, weights=name, version=version))
            return True

    def held_out(self) -> dict[str, dict[int, Row]]:
        """Frames that no run has trained on, by scan (RUN/SCAN) and frame id. Raises as `contents` does."""
        return self._held_out(self.contents())

    def held(self) -> list[Held]:
        """The samples by scan, oldest first. Raises as `contents` does."""
        with ExitStack() as stack:
            state = self._state(self.contents(), stack)
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
        with self._locked(), ExitStack() as stack:
            before = self.contents()
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
        with self._locked(), ExitStack() as stack:
            before = self.contents()
            state = self._state(before, stack)
            thinned = None if state is None else self._thinned(state, budget_bytes)
            self._write(before, thinned, self._held_out(before), budget_bytes=budget_bytes)
            return 0 if thinned is None else len(thinned)

    def _state(self, contents: Contents, stack: ExitStack) -> BufferState | None:
        if contents.samples is None:
            return None
        try:
            return read_buffer([self.path / contents.samples], stack)
        except FileNotFoundError as error:
            raise ValueError(
                f"found no {contents.samples} in {self.path}, expected it as {INDEX} says: half of this memory was "
                "deleted; restore it from a copy, or choose another folder"
            ) from error

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
        """Write samples and held-out frames, then the index in one step, then remove what nobody needs."""
        after, samples, held = replace(before, **changes), None, None
        if state is not None and len(state):
            samples = f"samples-{secrets.token_hex(8)}.safetensors"
            write_state(state, self.path / samples)
        left = {
            name: rows
            for name, rows in held_out.items()
            if rows and int(next(iter(rows.values()))["stratum"]) not in after.removed
        }
        if left:
            held = f"held-out-{secrets.token_hex(8)}.safetensors"
            write_held_out(evenly(left, after.budget_bytes // _HELD_SHARE), self.path / held)
        self._become(replace(after, samples=samples, held_out=held))

    def _become(self, after: Contents) -> None:
        _write_index(self.path / INDEX, after)
        for path in self.path.iterdir():
            ours = path.name.startswith(_PATTERNS) or path.name.startswith(f".{INDEX}.")
            if ours and path.name not in (after.samples, after.held_out, after.weights):
                path.unlink(missing_ok=True)

    def _copied(self, origin: Origin) -> str:
        name = f"weights-{secrets.token_hex(8)}.safetensors"
        with open(origin.folder / str(origin.weights), "rb") as source, open(self.path / name, "wb") as copy:
            while block := source.read(2**20):
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        return name

    def _refuse_half(self) -> None:
        found = [p.name for p in self.path.glob("*") if p.name.startswith(_PATTERNS)] if self.path.is_dir() else []
        if found:
            raise ValueError(
                f"found {', '.join(found)} without {INDEX} in {self.path}, expected both: half of this memory was "
                "deleted; restore it from a copy, or choose another folder"
            )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep files from being removed while a run starts from them."""
        try:
            handle = os.open(self.path / ".lock", os.O_RDONLY | os.O_CLOEXEC)
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
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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


def _contents(data: bytes, path: Path) -> Contents:
    try:
        found = json.loads(data)
        if found.get("format") != FORMAT:
            raise ValueError(
                f"found {path} of format {str(found.get('format'))[:50]!r}, expected {FORMAT!r}: use the version of "
                "steering that wrote it, or another folder"
            )
        names = [found["samples"], found["weights"], found.get("held_out")]
        version, removed, runs = found["version"], found["removed"], found["runs"]
        fits = all(n is None or (isinstance(n, str) and n.startswith(_PATTERNS) and "/" not in n) for n in names)
        fits = fits and type(found["budget_bytes"]) is int and found["budget_bytes"] > 0
        fits = fits and (version is None or isinstance(version, dict)) and all(type(key) is int for key in removed)
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
        removed=tuple(removed),
    )


def _write_index(path: Path, contents: Contents) -> None:
    content = {"format": FORMAT, "written": time.time(), **vars(contents)}
    write_whole(path, json.dumps(content, indent=1).encode(), durable=True)


def memories(folders: Sequence[Path]) -> list[Memory]:
    """The memories among these folders and directly below them."""
    found = [inside for folder in folders for inside in (folder, *sorted(folder.glob("*/")))]
    return [Memory(folder) for folder in found if (folder / INDEX).is_file()]
