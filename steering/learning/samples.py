"""The labelled frames that a rank holds, scan by scan, and the order in which it trains on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.learning.identity import ELSEWHERE, identities, keys_of
from steering.learning.rows import Layout, numpy_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """Labelled frames of one scan, on their way from the label maker to a rank."""

    scan: str
    stratum: int
    """The scan's key in the rehearsal buffer, see `stratum_of`."""
    frame_id: NDArray[np.int64]
    """(n,)"""
    counts: NDArray
    """(n, y, x) in the detector's dtype."""
    amplitude: NDArray[np.float32]
    """(n, patch, patch)"""
    phase: NDArray[np.float32]
    """(n, patch, patch), radians."""
    residual: NDArray[np.float32]
    """(n,) far-field residual of the label itself against its frame."""
    held_out: NDArray[np.bool_]
    """(n,) True: never train on it."""
    probe: NDArray[np.complex64] | None
    """(mode, y, x) as refined with these labels; None: these labels do not change it."""
    mask: NDArray[np.bool_]
    """(y, x), True = do not use."""
    generation: int = 0
    """Of the group of ranks among which they were shared out."""

    @property
    def nbytes(self) -> int:
        """Of counts and patches."""
        return self.counts.nbytes + self.amplitude.nbytes + self.phase.nbytes

    def share(self, rank: int, ranks: int, generation: int = 0) -> Labels:
        """The rank's part of the frames to train on, and all that are held out.

        It follows from the frame id and the group of ranks: a frame that is labelled again goes to the rank that has it
        already.
        Held-out frames go to every rank, so that no rank's death loses the frames that models are judged by.
        """
        mine = self.held_out | (owner_of(self.frame_id, ranks, generation) == rank)
        return Labels(
            scan=self.scan,
            stratum=self.stratum,
            frame_id=self.frame_id[mine],
            counts=self.counts[mine],
            amplitude=self.amplitude[mine],
            phase=self.phase[mine],
            residual=self.residual[mine],
            held_out=self.held_out[mine],
            probe=self.probe,
            mask=self.mask,
            generation=generation,
        )


def owner_of(frame_id: NDArray[np.int64], ranks: int, generation: int = 0) -> NDArray[np.int64]:
    """(n,) the rank that trains on each of these frames, in this generation of the group.

    Of consecutive ids each rank has the same number, within one at either end: they are dealt in turn, from a rank on
    that a hash says anew for each turn. So ids of one residue, such as those that are held out, fall to all ranks too.
    Another generation deals independently: the frames that are left when a rank is lost are spread over all ranks
    again, also where another one has taken its number.
    """
    ids = np.asarray(frame_id, np.int64)
    turn = (ids // ranks).view(np.uint64) + np.uint64(_APART * generation % 2**64)
    return (ids + keys_of(turn.view(np.int64)) % ranks) % ranks


_APART = 0xD1342543DE82EF95
"""So far are the numbers apart that are hashed for one turn in two generations."""

Row = dict[str, Tensor]

CLEARLY_WORSE = 1.1
"""Residual of a newer label over that of the one before it, above which the older one is kept. Not 1.0: labels of one
frame from two refinements that are equally right differ by their noise alone, and then the newer one should count."""


@dataclass
class ScanSamples:
    """What a rank holds of one scan."""

    train: dict[int, Row] = field(default_factory=dict)
    """By frame id. Of a scan that is over: those that came late, each to be drawn once."""
    held_out: dict[int, Row] = field(default_factory=dict)
    residual: dict[int, float] = field(default_factory=dict)
    """Residual of the label of every frame to train on that this rank has been given so far."""
    over: bool = False


KEPT = 1 / 32
"""Of the bytes for a scan's frames, what held-out frames of all scans that are over may take together: earlier runs'
models and later ones are judged by them."""
HELD_OUT, _HELD_OUT_SHARE = 512, 1 / 4
"""Held-out frames of a scan at most, and what they may take of the bytes for its frames. A distribution of residuals
needs some dozens; more cost time in every training round."""


class NoSamples(ValueError):
    """A rank has no sample to train on. Ranks train together or not at all, so all raise it."""


class Samples:
    """What a rank has to train on. A newer label of the same frame replaces the older one, unless it explains its frame
    clearly less well: labels come from refinement and from outside, in any order, and the better ones should stay.

    Without `keep_all` the frames of a scan are dropped when the next begins. Labels that come later are drawn once,
    among those of the scan that is being learnt, and so are offered to the rehearsal buffer like all others.

    Rows own their memory: as views they would keep the messages that brought them.
    """

    def __init__(self, *, seed: int, keep_all: bool, run: str = "", most_bytes: int = 2**30) -> None:
        """run: its identity, which says with scan and frame id who a sample is. most_bytes: of the frames of scans, to
        train on and held out, past which the oldest to train on are dropped."""
        self.keep_all, self.run = keep_all, run
        self.most_bytes = most_bytes
        self.dropped = 0
        """Frames, so far."""
        self.scans: dict[str, ScanSamples] = {}
        self.scan: str | None = None
        """The one that is trained on."""
        self.rng = np.random.default_rng(seed)
        self.dtype: np.dtype | None = None
        """Of the counts, one for all scans; None before the first."""
        self.elsewhere = np.zeros(0, np.int64)
        """Keys of samples that are not offered to the buffer: that of another rank has been offered them."""
        self._order: list[tuple[str, int]] = []

    @property
    def seen(self) -> dict[str, int]:
        """Frames of each scan that labels to train on came for, so far."""
        return {name: len(scan.residual) for name, scan in self.scans.items() if scan.residual}

    def add(self, labels: Labels) -> None:
        """Take labels in. Raises ValueError for counts that cannot be held as those before, see `suit`."""
        scan = self.scans.setdefault(labels.scan, ScanSamples())
        counts, identity = self._suited(labels), self._offered(labels.scan, labels.frame_id)
        for i, frame in enumerate(labels.frame_id.tolist()):
            held_out, worst = bool(labels.held_out[i]), CLEARLY_WORSE * scan.residual.get(frame, np.inf)
            if scan.over if held_out else labels.residual[i] > worst:  # no candidate is judged by a scan that is over
                continue
            row = {
                "counts": torch.from_numpy(counts[i].copy()),
                "amplitude": torch.from_numpy(labels.amplitude[i].copy()),
                "phase": torch.from_numpy(labels.phase[i].copy()),
                "stratum": torch.tensor(labels.stratum),
                "identity": torch.tensor(identity[i]),
            }
            if held_out:
                scan.held_out[frame] = row
                continue
            scan.residual[frame] = float(labels.residual[i])
            scan.train[frame] = row
            if scan.over:
                self._order.append((labels.scan, frame))
        self.trim()
        if scan.over:
            self.rng.shuffle(self._order)

    def trim(self) -> None:
        """Drop what there is no room for: of a scan's held-out frames all but those with the smallest keys, the same on
        every rank and spread over the scan; of frames to train on the oldest of the scan that has most."""
        current = [scan for name, scan in self.scans.items() if not scan.over and "/" not in name]
        for scan in current:
            width = max(map(_bytes, scan.held_out.values()), default=1)
            most = max(1, min(HELD_OUT, int(_HELD_OUT_SHARE * self.most_bytes) // width))
            if len(scan.held_out) > most:
                frames = np.array(list(scan.held_out), np.int64)
                kept = frames[np.sort(np.argsort(keys_of(frames), kind="stable")[:most])].tolist()
                scan.held_out = {frame: scan.held_out[frame] for frame in kept}
        rows = [*(one.held_out for one in current), *(one.train for one in self.scans.values())]
        excess = sum(len(one) * _bytes(next(iter(one.values()))) for one in rows if one) - self.most_bytes
        while excess > 0 and not self.keep_all:
            largest = max((one.train for one in self.scans.values()), key=len)
            if len(largest) < 2:
                break
            excess -= _bytes(largest.pop(next(iter(largest))))
            self.dropped += 1

    def suit(self, dtype: np.dtype) -> None:
        """Hold counts in a dtype that also has room for this one. Before anything is trained on: later all that is
        stored, here and on other ranks, has the dtype that counts have by then."""
        self.dtype = dtype if self.dtype is None else np.promote_types(self.dtype, dtype)
        for name, scan in self.scans.items():
            for rows in (scan.train, scan.held_out) if "/" not in name else ():
                for frame, row in rows.items():
                    rows[frame] = row | {
                        "counts": torch.from_numpy(row["counts"].numpy().astype(self.dtype, copy=False))
                    }

    def hold_as(self, layout: Layout | None) -> None:
        """Hold counts as a buffer stores them that was filled before."""
        for name, _, dtype in layout.fields if layout is not None else ():
            self.dtype = numpy_of(dtype) if name == "counts" else self.dtype

    def _suited(self, labels: Labels) -> NDArray:
        """The counts (n, y, x) as this rank holds all counts."""
        if self.scan is None or self.dtype is None:
            self.suit(labels.counts.dtype)
        held, found = self.dtype, labels.counts
        if held is None or found.dtype == held or np.can_cast(found.dtype, held):
            return found.astype(held, copy=False)
        good = found[:, ~labels.mask]
        if held.kind in "iu":  # what a bad pixel reads has no meaning
            limits = np.iinfo(held)
            found = np.clip(np.nan_to_num(found), limits.min, limits.max)
        cast = found.astype(held)
        if not np.array_equal(cast[:, ~labels.mask], good):
            raise ValueError(
                f"found counts of {good.dtype} up to {good.max():g} in scan {labels.scan!r}, expected such as {held} "
                "holds, as in the scans before: the rehearsal buffer stores all in one dtype; measure it in a run of "
                "its own, which may start --from this one"
            )
        return cast

    def keep_apart(self, keys: NDArray[np.int64]) -> None:
        """Offer the buffer no sample that has one of these keys, which ascend."""
        self.elsewhere = keys
        for name, scan in self.scans.items():
            identity = self._offered(name, np.array(list(scan.train), np.int64))
            for frame, own in zip(scan.train, identity.tolist(), strict=True):
                scan.train[frame] = scan.train[frame] | {"identity": torch.tensor(own)}

    def _offered(self, scan: str, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the identity of each frame, ELSEWHERE where its sample is not to be offered."""
        found = identities(self.run, scan, frames)
        if not len(self.elsewhere):
            return found
        keys = keys_of(found)
        place = np.minimum(np.searchsorted(self.elsewhere, keys), len(self.elsewhere) - 1)
        return np.where(self.elsewhere[place] == keys, ELSEWHERE, found)

    def begin(self, scan: str) -> None:
        """Train on this scan from now on; without `keep_all`, frames of the scan before are dropped."""
        if not self.keep_all and self.scan not in (None, scan):
            self.end(str(self.scan))
        self.scan = scan

    def end(self, scan: str) -> None:
        """Drop the frames of a scan, but for some that are held out: runs that start from this one are judged by them.

        All scans that are over share `KEPT` of `most_bytes` for them, each as much as another.
        """
        ended = self.scans.setdefault(scan, ScanSamples())
        if not ended.over:
            ended.over = True
            ended.train.clear()
            over = {name: one.held_out for name, one in self.scans.items() if one.over and "/" not in name}
            for name, kept in evenly(over, int(KEPT * self.most_bytes)).items():
                self.scans[name].held_out = kept

    def count(self, scan: str) -> int:
        """How many frames of the scan there are to train on."""
        return len(self.scans[scan].train) if scan in self.scans else 0

    def shuffle(self) -> None:
        """Begin a new epoch, with the late samples first: after samples were moved between ranks."""
        self._order = [(name, frame) for name, scan in self.scans.items() if scan.over for frame in scan.train]
        self.rng.shuffle(self._order)

    def take(self, n: int, out: Mapping[str, Tensor]) -> None:
        """Write n samples into the first rows of `out`: every sample once per epoch, epochs joined end to end."""
        for i in range(n):
            for name, value in self._draw().items():
                out[name][i] = value

    def restore(self, scans: Mapping[str, ScanSamples], scan: str | None) -> None:
        """Take over what was held at another time, before anything else is taken in."""
        for name, held in scans.items():
            own = self.scans.setdefault(name, ScanSamples())
            own.train |= held.train
            own.held_out |= held.held_out
            own.residual |= held.residual
            own.over = own.over or held.over
        self.scan = scan

    def bring_back(self, scans: Mapping[str, ScanSamples]) -> None:
        """Take in what a lost rank held of scans that go on, where this rank has nothing of a frame."""
        for name, held in scans.items():
            own = self.scans.setdefault(name, ScanSamples())
            if own.over or held.over:
                continue
            own.held_out = {**held.held_out, **own.held_out}
            for frame in set(held.residual) - set(own.residual):
                own.residual[frame] = held.residual[frame]
                if frame in held.train:
                    own.train[frame] = held.train[frame]

    def held_out(self, scan: str) -> Row | None:
        """The held-out samples of a scan, stacked; None where there are none."""
        rows = self.scans[scan].held_out.values() if scan in self.scans else ()
        return stacked(list(rows)) if rows else None

    def example(self) -> Row:
        """Any sample, as an example of the fields."""
        return next(iter(next(scan.train for scan in self.scans.values() if scan.train).values()))

    def __len__(self) -> int:
        return sum(len(scan.train) for scan in self.scans.values())

    def _draw(self) -> Row:
        while True:
            if not self._order:
                names = [name for name, scan in self.scans.items() if not scan.over and self.keep_all]
                names = names or [str(self.scan)]
                everything = [(name, frame) for name in names for frame in self.scans[name].train]
                self._order = [everything[i] for i in self.rng.permutation(len(everything))]
            name, frame = self._order.pop()
            scan = self.scans[name]
            if frame in scan.train:
                return scan.train.pop(frame) if scan.over else scan.train[frame]


def _bytes(row: Row) -> int:
    return sum(value.nbytes for value in row.values())


def evenly(scans: Mapping[str, dict[int, Row]], most_bytes: int) -> dict[str, dict[int, Row]]:
    """The frames of each scan, by frame id, spread over the scan where there is no room for all: at least one each."""
    widest = max((_bytes(row) for frames in scans.values() for row in frames.values()), default=1)
    each = max(1, most_bytes // widest // max(1, len(scans)))
    found = {}
    for name, frames in scans.items():
        order = sorted(frames)
        chosen = {order[len(order) * k // each] for k in range(each)} if len(order) > each else order
        found[name] = {frame: frames[frame] for frame in sorted(chosen)}
    return found


def stacked(rows: list[Row]) -> Row:
    """Fields (n, ...) of n samples, at least one."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
