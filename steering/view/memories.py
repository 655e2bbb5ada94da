"""What memories hold, in lines for the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from steering.learning import Held, Memory, memories
from steering.learning.memory_index import FORMAT
from steering.view.status import duration


def memory_line(folders: Sequence[Path]) -> list[str]:
    """A line for each memory among these folders and directly below them. Raises FileNotFoundError where is none."""
    found = memories(folders)
    if not found:
        raise FileNotFoundError(
            f"{', '.join(map(str, folders))}: found no memory, expected one: runs make it (--memory)"
        )
    lines = []
    for memory in found:
        try:
            held = memory.held()
            lines.append(f"{memory.path}: {_amount(held)} of {len(held)} scans of {len({h.run for h in held})} runs")
        except (OSError, ValueError) as error:
            lines.append(f"{memory.path}: cannot be read: {error}")
    return lines


def memory_lines(folder: Path) -> list[str]:
    """Samples by scan, oldest first, then model and budget. Raises OSError, and ValueError for what is no memory."""
    memory = Memory(folder)
    [line] = memory_line([folder])
    contents, now = memory.contents(), time.time()
    lines = [line]
    for one in memory.held():
        age = duration(max(0.0, now - one.begun))
        share = f"{one.samples} samples of {one.offered}"
        lines.append(f"  {one.run}/{one.scan}: {share}, {_size(one.bytes)}, {age} old")
    version = contents.version or {}
    model = f"model of {contents.runs[-1]}" if contents.runs and contents.weights else "no model"
    if version.get("steps"):
        model += f", version {version.get('number')} after {version['steps']} steps"
    if version.get("validation_error") is not None:
        model += f", error {version['validation_error']:.4g}"
    lines.append(f"  {model}")
    lines.append(
        f"  keeps {_size(contents.budget_bytes)} of samples; {FORMAT}; {len(contents.removed)} scans taken out"
    )
    return lines


def _amount(held: Sequence[Held]) -> str:
    return f"{sum(one.samples for one in held)} samples ({_size(sum(one.bytes for one in held))})"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
