"""Training and held-out samples, given anew to the ranks of a group that has just formed.

Samples to train on go to the rank that the hash of their frame id names, as labels do; held-out samples go to every
rank that lacks them. What a lost rank alone held is made again by the next labelling. Samples that a buffer stores stay
there: their frames are not offered to another one, so that each is stored once, as likely as all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from steering.learning.buffer import RehearsalBuffer
from steering.learning.buffer_state import scan_names
from steering.learning.group import exchange_bytes
from steering.learning.identity import WHOLE, identities, keys_of
from steering.learning.samples import Samples, ScanSamples, owner_of, stacked
from steering.learning.training_state import Packed

FrameKey = tuple[str, int]
"""Scan and frame id."""


def redistribute(
    samples: Samples, buffer: RehearsalBuffer, *, rank: int, ranks: int, source: int, generation: int
) -> None:
    """Exchange samples between all ranks of the default group, which call this together.

    source: the rank whose present scan all go on with. A scan that is over for one rank is over for all.
    """
    everyone = [Packed.from_bytes(data) for data in exchange_bytes([_said(samples, buffer).to_bytes()] * ranks)]
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
    for said in everyone:
        if said.scalars["dtype"] is not None:  # a new rank holds counts as all others do
            samples.suit(np.dtype(said.scalars["dtype"]))
        buffer.scans = {**scan_names(said.scalars["names"]), **buffer.scans}
    own = {key: name.scan for key, name in buffer.scans.items() if name.run == samples.run}
    given = {key: _keys(samples, name) for key, name in own.items() if name in samples.scans}
    if buffer.policy != "replacement":  # which stores a sample as often as it is offered
        stored, strata = ([said.tensors[what].numpy() for said in everyone] for what in ("keys", "strata"))
        samples.keep_apart(not_to_offer(rank, stored, strata, given))
    samples.trim()
    samples.shuffle()


def _said(samples: Samples, buffer: RehearsalBuffer) -> Packed:
    """What a rank tells all others."""
    state = buffer.state()
    names = [[key, *name] for key, name in buffer.scans.items()]
    mine = [key for key, name in buffer.scans.items() if name.run == samples.run]
    said = Packed(
        scalars={
            "over": [name for name, scan in samples.scans.items() if scan.over],
            "scan": samples.scan,
            "dtype": None if samples.dtype is None else samples.dtype.str,
            "names": names,
        }
    )
    for number, (name, scan) in enumerate(samples.scans.items()):
        said.scalars.setdefault("scans", []).append(name)
        said.tensors[str(number)] = torch.tensor(list(scan.held_out), dtype=torch.int64)
    said.tensors["keys"] = torch.from_numpy(state.key[np.isin(state.stratum, mine)])
    said.tensors["strata"] = torch.from_numpy(state.strata[state.strata[:, 1] > 0])
    return said


def _keys(samples: Samples, scan: str) -> NDArray[np.int64]:
    """Of all frames of a scan that this rank has been given to train on."""
    return keys_of(identities(samples.run, scan, np.array(list(samples.scans[scan].residual), np.int64)))


def not_to_offer(
    rank: int,
    stored: Sequence[NDArray[np.int64]],
    strata: Sequence[NDArray[np.int64]],
    given: Mapping[int, NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Keys of the samples that this rank's buffer is not to be offered: others store them, or have turned them away.

    What was given to some rank before, and a buffer as full as the fullest turns away, is not offered again: else a new
    rank, whose buffer is empty, would store all that it trains on of a scan of which the others store a part.

    stored: keys in each rank's buffer; strata: stratum, samples offered and bound of those it has seen, int64 (n, 3);
    given: by stratum, keys of the frames that this rank trains on now.
    """
    lowest: dict[int, int] = {}
    for table in strata:
        for stratum, _, bound in table.tolist():
            lowest[stratum] = min(bound, lowest.get(stratum, WHOLE))
    found = [keys for number, keys in enumerate(stored) if number != rank]
    found += [keys[keys >= lowest.get(stratum, WHOLE)] for stratum, keys in given.items()]
    every = np.concatenate([np.zeros(0, np.int64), *found])
    return np.setdiff1d(every, stored[rank])  # what is stored here is brought up to date


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
