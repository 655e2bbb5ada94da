"""Training and held-out samples, given anew to the ranks of a group that has just formed.

Samples to train on go to the rank that the hash of their frame id names, as labels do; held-out samples go to every
rank that lacks them. What a lost rank alone held is made again by the next labelling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steering.learning.group import exchange_bytes
from steering.learning.samples import Samples, ScanSamples, owner_of, stacked
from steering.learning.training_state import Packed

FrameKey = tuple[str, int]
"""Scan and frame id."""


def redistribute(samples: Samples, *, rank: int, ranks: int, source: int, generation: int) -> None:
    """Exchange samples between all ranks of the default group, which call this together.

    source: the rank whose present scan all go on with. A scan that is over for one rank is over for all.
    """
    own = Packed(scalars={"over": [name for name, scan in samples.scans.items() if scan.over], "scan": samples.scan})
    for number, (name, scan) in enumerate(samples.scans.items()):
        own.scalars.setdefault("scans", []).append(name)
        own.tensors[str(number)] = torch.tensor(list(scan.held_out), dtype=torch.int64)
    everyone = [Packed.from_bytes(data) for data in exchange_bytes([own.to_bytes()] * ranks)]
    for name in {name for other in everyone for name in other.scalars["over"]}:
        samples.end(name)
    held = [
        {(name, f) for n, name in enumerate(p.scalars.get("scans", [])) for f in p.tensors[str(n)].tolist()}
        for p in everyone
    ]
    wanted = missing(held, rank)
    arrived = exchange_bytes([_part(samples, (to, ranks, generation), wanted[to]).to_bytes() for to in range(ranks)])
    for scan in samples.scans.values():
        scan.train.clear()
        scan.residual.clear()
    for data in arrived:
        _take_up(samples, Packed.from_bytes(data))
    samples.scan = everyone[source].scalars["scan"]
    samples.shuffle()


def missing(held: Sequence[set[FrameKey]], rank: int) -> list[set[FrameKey]]:
    """Held-out frames that `rank` sends to each rank: those that it alone, or first of several, has for it.

    held: what each rank holds.
    """
    before = set().union(*held[:rank])
    return [held[rank] - before - other for other in held]


def _part(samples: Samples, to: tuple[int, int, int], held_out: set[FrameKey]) -> Packed:
    """What goes to a rank (its number, of so many, in this generation), this one included: its frames to train on, and
    the held-out frames that it lacks."""
    part = Packed(scalars={"scans": list(samples.scans)})
    for number, (name, scan) in enumerate(samples.scans.items()):
        given = np.array(list(scan.residual), np.int64)
        theirs = given[owner_of(given, *to[1:]) == to[0]].tolist()
        part.tensors[f"{number}.given"] = torch.tensor(theirs, dtype=torch.int64)
        part.tensors[f"{number}.residual"] = torch.tensor([scan.residual[f] for f in theirs], dtype=torch.float64)
        rows = {
            "train": {frame: scan.train[frame] for frame in theirs if frame in scan.train},
            "held_out": {frame: row for frame, row in scan.held_out.items() if (name, frame) in held_out},
        }
        for kind, found in rows.items():
            part.tensors[f"{number}.{kind}"] = torch.tensor(list(found), dtype=torch.int64)
            for field, value in (stacked(list(found.values())) if found else {}).items():
                part.tensors[f"{number}.{kind}.{field}"] = value
    return part


def _take_up(samples: Samples, part: Packed) -> None:
    """Add what one rank has sent. Of two labels of a frame, the one that explains its frame better is kept."""
    for number, name in enumerate(part.scalars["scans"]):
        scan = samples.scans.setdefault(name, ScanSamples())
        residuals = part.tensors[f"{number}.residual"].tolist()
        given = dict(zip(part.tensors[f"{number}.given"].tolist(), residuals, strict=True))
        better = {f for f, residual in given.items() if f not in scan.residual or residual < scan.residual[f]}
        scan.residual |= {frame: given[frame] for frame in better}
        for kind, into in (("train", scan.train), ("held_out", scan.held_out)):
            fields = {
                key.split(".", 2)[2]: value
                for key, value in part.tensors.items()
                if key.startswith(f"{number}.{kind}.")
            }
            for row, frame in enumerate(part.tensors[f"{number}.{kind}"].tolist()):
                if kind == "held_out" or frame in better or frame not in into:
                    into[frame] = {name: value[row].clone() for name, value in fields.items()}
