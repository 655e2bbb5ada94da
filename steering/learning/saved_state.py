"""The saved state of a training: weights, optimiser, step and every rank's rehearsal buffer, all after the same step.

What is drawn for a step follows from the seed and the step's number, so the number is the plan's position. Files are
safetensors with JSON, nothing is pickled. A rank writes its whole buffer once, then only the slots that have changed,
until the changes weigh more than the whole. `saved_state.json` names the files that belong together, and is replaced
last: a reader finds the state before or the state after, never a part of one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from steering.learning.buffer_state import BufferState, merge, read_state, reshard, write_state
from steering.learning.loop import Loop
from steering.learning.training_state import Packed, capture, restore

INDEX = "saved_state.json"


class SavedState:
    """Writes the states of one rank's loop into a folder that all ranks share, and restores the last one.

    Args:
        folder: made where it is not there.
        loop: of this rank.
        ranks: that write together; each calls `write` after the same step, and `restore` before its `Loop.connect`.
    """

    def __init__(self, folder: Path, loop: Loop, *, ranks: int) -> None:
        self.folder, self.loop, self.ranks = Path(folder), loop, ranks
        self._chain: list[str] = []
        """Files of this rank's buffer: a whole state, then changes."""
        self._clock = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> Path:
        """Write the state; returns the file that names it. Blocks until all ranks have written their parts.

        Raises OSError where a file cannot be written; the state before remains valid.
        """
        loop, step, index = self.loop, self.loop.steps, self.folder / INDEX
        whole = not self._chain or self._size(self._chain[1:]) >= self._size(self._chain[:1])
        state = loop.buffer.state(0 if whole else self._clock, copy=False)
        name = f"{step:08d}.rank-{loop.rank}.safetensors"
        write_state(self.folder / name, state)
        chain = [name] if whole else [*self._chain, name]
        _replace(self.folder / _part(step, loop.rank), chain)
        if loop.rank == 0:
            capture(loop.network, loop.optimiser).write(self.folder / _weights(step))
        if self.ranks > 1:
            dist.barrier()
        if loop.rank == 0:
            _replace(index, {"step": step, "ranks": self.ranks})
            self._tidy(step)
        self._chain, self._clock = chain, state["clock"]
        return index

    def restore(self) -> bool:
        """Restore the last state, written by any number of ranks; False where there is none.

        With as many ranks as wrote it every rank gets its own buffer back; with more or fewer, the samples are
        distributed evenly, stratum by stratum.

        Raises ValueError for a state of another network, optimiser or kind of sample.
        """
        index = self.folder / INDEX
        if not index.is_file():
            return False
        saved = json.loads(index.read_text())
        step, before = saved["step"], saved["ranks"]
        restore(Packed.read(self.folder / _weights(step)), self.loop.network, self.loop.optimiser)
        if before == self.ranks:
            state = self._state(step, self.loop.rank)
        else:
            state = reshard([self._state(step, rank) for rank in range(before)], self.loop.rank, self.ranks)
        self.loop.buffer.load(state)
        self.loop.steps = step
        return True

    def _state(self, step: int, rank: int) -> BufferState:
        chain = json.loads((self.folder / _part(step, rank)).read_text())
        return merge(read_state(self.folder / name) for name in chain)

    def _size(self, names: list[str]) -> int:
        return sum((self.folder / name).stat().st_size for name in names)

    def _tidy(self, step: int) -> None:
        """Remove the files that the state of this step does not need."""
        needed = {INDEX, _weights(step)}
        for rank in range(self.ranks):
            part = self.folder / _part(step, rank)
            needed |= {part.name, *json.loads(part.read_text())}
        for path in self.folder.iterdir():
            # A rank that is ahead may be writing the next state already.
            if path.name not in needed and path.name.split(".")[0] < f"{step:08d}":
                path.unlink(missing_ok=True)


def _part(step: int, rank: int) -> str:
    return f"{step:08d}.rank-{rank}.json"


def _weights(step: int) -> str:
    return f"{step:08d}.weights.safetensors"


def _replace(path: Path, content: Any) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content))
    draft.replace(path)
