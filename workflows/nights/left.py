"""What the day has left: runs below a folder that a memory does not have yet, and what was done with it before."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from steering.files import read_json
from steering.learning import Memory
from steering.records.whole_file import write_whole
from steering.runner.again import continued_by
from steering.runner.earlier_runs import origin_of, remember
from steering.runner.folder import ENDINGS, RunFolder
from steering.runner.liveness import gone

STATE = "nightly.json"
"""In the memory's folder: what was learnt from last."""


class Busy(Exception):
    """Another nightly run holds the memory."""


@contextlib.contextmanager
def alone(memory: Memory) -> Iterator[None]:
    """Hold a memory, which need not be there yet, against other nightly runs. The lock is the system's: it goes with
    its holder, however that ends.

    Raises Busy where another one has it.
    """
    path = memory.path.with_name(f".{memory.path.name}.nightly.lock")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{memory.path}: found another nightly run at work there: try again later") from None
        yield
    finally:
        os.close(handle)


@dataclass(kw_only=True)
class State:
    """What earlier nights have done."""

    done: dict[str, object] = field(default_factory=dict)
    """What the last one that came to a decision learnt from."""
    said: str = ""
    """Its decision."""
    published: bool = False
    """A night has published a model: those of single runs do not take its place."""
    refused: dict[str, str] = field(default_factory=dict)
    """Runs that do not fit this memory, by identity and number of their last checkpoint, with the reason."""

    @classmethod
    def read(cls, memory: Memory) -> "State":
        """The state in a memory's folder; a new one where there is none. Raises ValueError for one that is damaged."""
        path = memory.path / STATE
        try:
            return cls(**read_json(path))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise ValueError(f"found {path} damaged ({error}), expected what a nightly run wrote: delete it") from None

    def write(self, memory: Memory) -> None:
        """Write it whole."""
        write_whole(memory.path / STATE, json.dumps(asdict(self), indent=1).encode())


def memory_of(runs: Path, said: str | None) -> Memory:
    """The memory that is learnt from: the folder itself, the one said, or RUNS/memory.

    Raises FileNotFoundError where there is no such folder, ValueError for a single run.
    """
    if not runs.is_dir():
        raise FileNotFoundError(f"{runs}: found no such folder, expected a folder of runs, or a memory")
    if (runs / "summary.json").is_file():
        raise ValueError(f"{runs}: found a single run, expected the folder it is in, or a memory")
    if (runs / "memory.json").is_file():
        return Memory(runs)
    return Memory(Path(said) if said else runs / "memory")


def take_in(runs: Path, memory: Memory, state: State) -> list[str]:
    """Add every run that has ended and has more than the memory knows of it; complaints about those that it cannot
    take. A run that has failed and was recovered later is added again: it has gone on.

    A run that goes on is left for the next night. The model of the newest run is what the first night compares with.
    Raises OSError, ValueError for a memory that is damaged: that is no fault of the runs.
    """
    complaints: list[str] = []
    memory.held()
    for run in _campaigns(runs, complaints):
        try:
            complaints += _add(run, memory, state)
        except OSError as error:
            place = Path(str(error.filename))
            of_run = place.is_relative_to(run.path) or place.is_relative_to(run.path.resolve())
            if not (of_run or isinstance(error, FileNotFoundError)):
                raise  # of the memory
            complaints.append(f"{run.path.name} cannot be read: {error}")
    return complaints


def _add(run: RunFolder, memory: Memory, state: State) -> list[str]:
    number = _last_checkpoint(run)
    known = f"{run.identity} to checkpoint {number}"
    if known in state.refused or memory.contents().added.get(run.identity, -1) >= number >= 0:
        return []
    try:
        remember(memory, run, model=not state.published)
    except ValueError as error:
        state.refused[known] = str(error)
        state.write(memory)
        return [f"{run.path.name} is left out: {error}"]
    return []


def _last_checkpoint(run: RunFolder) -> int:
    """Number of that of its ranks; -1 where it is damaged, as `remember` says then."""
    try:
        return origin_of(run).number
    except ValueError:
        return -1


def _campaigns(runs: Path, complaints: list[str]) -> list[RunFolder]:
    """Runs that have ended and have trained ranks, oldest first."""
    found = []
    for path in sorted(runs.glob("*/summary.json")):
        try:
            run = RunFolder(path.parent)
            summary = run.summary()
        except (OSError, ValueError) as error:
            complaints.append(f"{path.parent.name} cannot be read: {error}")
            continue
        trained = any(run.checkpoints.glob("ranks.json")) or any(run.checkpoints.glob("*/ranks.json"))
        if not trained:
            continue
        if summary.get("status") in ENDINGS:
            found.append((str(summary.get("started", "")), run))
        elif gone(run):
            complaints.append(f"{run.path.name} was killed and is left out until it has ended: {continued_by(run)}")
    return [run for _, run in sorted(found, key=lambda one: (one[0], one[1].name))]
