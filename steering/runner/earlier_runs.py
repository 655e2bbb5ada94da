"""What a run starts from: earlier runs, a memory, or an untrained network; and what it leaves for later ones."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from steering.campaign import Event, GroupChanged, ModelPublished, RunStarted
from steering.learning import Memory, Origin, best_weights, names_in, stored_names, usable
from steering.learning.memory_index import INDEX
from steering.learning.tensor_file import inside
from steering.models import ModelStore, Network
from steering.records import ModelVersion
from steering.records.whole_file import write_whole
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.manifest import LAST, read_ranks, written
from steering.runner.resolved import note_settings


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    origins: tuple[Origin, ...] = ()
    """None: it begins untrained."""
    version: ModelVersion | None = None
    """Description of the model of the first origin that has one."""
    first: ModelVersion | None = None
    """Version 0 of this run."""
    said: str = ""
    """What it is, in words."""
    without: tuple[str, ...] = ()
    """Origins whose samples are not used, and why, in words."""
    memory: Memory | None = None
    """That it adds to at its end."""

    @property
    def events(self) -> list[Event]:
        """Where the run begins, where that is not an untrained network."""
        names = tuple(origin.run for origin in self.origins if origin.buffers)
        started = RunStarted(time=time.time(), origins=names, model=self.said, without=self.without)
        return [started] if self.origins else []

    @property
    def published(self) -> ModelPublished:
        """Version 0 in service."""
        error, residual = (
            (None, None)
            if self.first is None
            else (
                self.first.validation_error,
                self.first.validation_residual,
            )
        )
        return ModelPublished(time=time.time(), version=0, validation_error=error, validation_residual=residual)

    read: ExitStack = field(default_factory=ExitStack)
    """Keeps the files of memories where they are; closed once all is read."""


def find_start(experiment: Experiment, folder: RunFolder) -> Start:
    """What this run starts from, as the experiment says, or as the command line has said for the folder; of a run that
    is recovered, the memory alone.

    Raises OSError, and ValueError for a run without a checkpoint, for files that are damaged, and for a policy of
    the buffer or a strategy whose samples cannot be added to the memory.
    """
    said = folder.start()
    runs = () if folder.recovering else experiment.start_from or tuple(map(Path, said["from"]))
    place = experiment.memory or said["memory"]
    memory, read = None if place is None else Memory(Path(place)), ExitStack()
    # Found by a trial of the strategy, which a run that starts from nothing need not pay for.
    wanted = stored_names(experiment.strategy, experiment.network) if runs or memory is not None else set()
    if memory is not None:
        if experiment.trainer.insertion == "replacement":
            raise ValueError(
                "found insertion='replacement' in a run with a memory, expected 'reservoir' or 'balanced': what it "
                "keeps fades with its age, and cannot be united with what other runs have kept"
            )
        memory.check_writable()  # while nothing of it is read: --from may name it too
        if not folder.recovering:
            _check_same(memory, wanted)
    found = [_earlier(Path(run), read) for run in runs]
    if memory is not None and not folder.recovering:
        read.enter_context(memory.reading())
        found += [_of_memory(memory)]
    judged = [usable(origin, wanted) for origin, _ in found if origin is not None]
    version = next((version for origin, version in found if origin is not None and origin.weights is not None), None)
    origins, without = tuple(origin for origin, _ in judged), tuple(why for _, why in judged if why)
    return Start(origins=origins, version=version, memory=memory, read=read, without=without)


def _check_same(memory: Memory, wanted: set[str]) -> None:
    with memory.reading():
        origin = memory.origin()
        found = set() if origin is None else names_in(origin)
    if found and wanted and found != wanted:
        raise ValueError(
            f"{memory.path}: found a memory whose samples have the fields {', '.join(sorted(found))}, expected "
            f"{', '.join(sorted(wanted))}, as this run's strategy stores them: take the strategy of the runs before, "
            "another folder, or start with --from alone, which leaves the memory as it is"
        )


def _earlier(path: Path, read: ExitStack) -> tuple[Origin | None, ModelVersion | None]:
    if (path / INDEX).is_file():
        memory = Memory(path)
        read.enter_context(memory.reading())
        return _of_memory(memory)
    run = RunFolder(path)
    return origin_of(run), _served(run)


def _of_memory(memory: Memory) -> tuple[Origin | None, ModelVersion | None]:
    contents = memory.contents()
    version = None if contents.version is None else ModelStore.description(dict(contents.version), memory.path / INDEX)
    return memory.origin(), version


def origin_of(run: RunFolder) -> Origin:
    """The ranks' part of a run's last checkpoint. Raises ValueError where there is none or it is damaged, OSError."""
    root = inside(run.path, "checkpoints/ranks").parent
    places = [root / LAST, *(root / str(number) / LAST for number in reversed(written(root)))]
    for place in places:
        part = read_ranks(root, place) if place.is_file() else None
        if part is not None:
            return Origin(
                folder=root,
                run=run.identity,
                buffers=part.buffers,
                weights=part.weights,
                samples=part.samples,
                number=part.number,
            )
    raise ValueError(
        f"{run.path}: found no checkpoint of its ranks, expected one to start from: a run writes it while it goes on "
        "and at its end; runs of versions before 0.2 have none"
    )


def _served(run: RunFolder) -> ModelVersion | None:
    store = ModelStore(run.models)
    number = store.newest()
    return None if number is None else store.describe(number)


def begin(experiment: Experiment, folder: RunFolder) -> Start:
    """What this run starts from, with version 0 in its store, unless it is recovered; its settings are noted in the
    folder. Raises as `find_start` does."""
    note_settings(experiment, folder)
    start, network = find_start(experiment, folder), experiment.network
    if folder.recovering:
        return start
    first, said = first_version(network, start)
    network.optics.set(experiment.source.probe, ~experiment.source.geometry.good())
    ModelStore(folder.models).publish(network, first)
    return replace(start, first=first, said=said)


def first_version(network: Network, start: Start) -> tuple[ModelVersion, str]:
    """Have the network hold what the run begins with; the description of version 0, and what to say of it.

    Raises OSError, and ValueError for a file that is damaged.
    """
    untrained = ModelVersion(
        number=0, network=type(network).__name__, hyperparameters=dict(network.hyperparameters), parents=()
    )
    origin = next((origin for origin in start.origins if origin.weights is not None), None)
    if origin is None:
        return untrained, "from an untrained network"
    reason = best_weights(origin, network)
    if reason:
        return untrained, f"from an untrained network: {reason}"
    said = f"from the model of {origin.run}"
    if start.version is None or start.version.network != untrained.network:
        return untrained, said
    seen = {name if "/" in name else f"{origin.run}/{name}": n for name, n in start.version.trained_on.items()}
    return replace(start.version, number=0, parents=(), trained_on=seen), said


async def leave(ranks: Any, folder: RunFolder, start: Start) -> dict[str, Any]:
    """The last checkpoint of a run's ranks, and what it adds to its memory; figures for the summary. Raises OSError."""
    root = folder.checkpoints
    while isinstance(part := await ranks.checkpoint(root), GroupChanged):
        pass
    write_whole(root / LAST, json.dumps(part.to_json()).encode(), durable=True)
    figures: dict[str, Any] = {"last_checkpoint_bytes": part.bytes}
    if start.memory is not None:
        figures["memory"] = str(start.memory.path)
        figures["memory_samples"] = remember(start.memory, folder)
    return figures


def remember(memory: Memory, run: RunFolder, *, model: bool = True) -> int:
    """Add what a run has learnt to a memory; returns the samples there. model: its own takes the place of that there.

    Raises OSError, and ValueError where the run has no checkpoint, or its samples do not fit those stored.
    """
    origin, version = origin_of(run), _served(run)
    if not model:
        origin = replace(origin, weights=None)
    return memory.add(run.identity, origin, None if version is None else asdict(version))
