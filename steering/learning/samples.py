"""The labelled frames that a rank holds, scan by scan, and the order in which it trains on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """Labelled frames of one scan, on their way from the label maker to a rank."""

    scan: str
    stratum: int
    """The scan's key in the rehearsal buffer."""
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
    """(mode, y, x) as refined with these labels; None: they say nothing of it."""
    mask: NDArray[np.bool_]
    """(y, x), True = do not use."""

    def share(self, rank: int, ranks: int) -> Labels:
        """The rank's part of the frames to train on, and for rank 0 all that are held out.

        It follows from the frame id alone: a frame that is labelled again goes to the rank that has it already.
        """
        # Fibonacci hashing: ids of one residue, such as those that are not held out, spread evenly over the ranks.
        home = ((self.frame_id.astype(np.uint64) * np.uint64(11400714819323198485)) >> np.uint64(33)) % np.uint64(ranks)
        mine = np.where(self.held_out, rank == 0, home == rank)
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
        )


Row = dict[str, Tensor]

_CLEARLY = 1.1
"""Residual of a newer label over that of the one before it, above which it is the worse of the two."""


class Samples:
    """What a rank has to train on. A newer label of the same frame replaces the older one, unless it explains its frame
    clearly less well: labels come from refinement and from outside, in any order, and the better ones should stay.

    Without `keep_all` the frames of a scan are let go when the next begins. Labels that come after that are drawn once,
    among those of the scan that is being learnt, and so are offered to the rehearsal buffer like all others.
    """

    def __init__(self, *, seed: int, keep_all: bool) -> None:
        self.keep_all = keep_all
        self._rng = np.random.default_rng(seed)
        self._train: dict[str, dict[int, Row]] = {}
        self._held_out: dict[str, dict[int, Row]] = {}
        self._late: dict[tuple[str, int], Row] = {}
        self._scan: str | None = None
        self._over: set[str] = set()
        self._order: list[tuple[str, int]] = []
        self._residual: dict[str, dict[int, float]] = {}

    @property
    def seen(self) -> dict[str, int]:
        """Frames of each scan that labels to train on came for, so far."""
        return {scan: len(frames) for scan, frames in self._residual.items()}

    def add(self, labels: Labels) -> None:
        """Take labels in."""
        late = labels.scan in self._over
        known = self._residual.setdefault(labels.scan, {})
        rows = self._train.setdefault(labels.scan, {}) if not late else {}
        held_out = self._held_out.setdefault(labels.scan, {}) if not late else {}  # nobody judges by what is over
        for i, frame in enumerate(labels.frame_id.tolist()):
            row = {
                "counts": torch.from_numpy(labels.counts[i]),
                "amplitude": torch.from_numpy(labels.amplitude[i]),
                "phase": torch.from_numpy(labels.phase[i]),
                "stratum": torch.tensor(labels.stratum),
            }
            if labels.held_out[i]:
                held_out[frame] = row
                continue
            if labels.residual[i] > _CLEARLY * known.get(frame, np.inf):
                continue
            known[frame] = float(labels.residual[i])
            if late:
                self._late[labels.scan, frame] = row
                self._order.append((labels.scan, frame))
            else:
                rows[frame] = row
        if late:
            self._rng.shuffle(self._order)

    def begin(self, scan: str) -> None:
        """Train on this scan from now on; without `keep_all`, frames of other scans are let go."""
        if not self._train.get(scan):
            raise ValueError(f"found no labelled frame of scan {scan!r} on this rank, expected labels before training")
        if not self.keep_all and self._scan not in (None, scan):
            self._over.add(str(self._scan))
            self._train.pop(str(self._scan))
            self._held_out.pop(str(self._scan))
        self._scan = scan

    def take(self, n: int, out: Mapping[str, Tensor]) -> None:
        """Write n samples into the first rows of `out`: every sample once per epoch, epochs joined end to end."""
        for i in range(n):
            for name, value in self._draw().items():
                out[name][i] = value

    def held_out(self, scan: str) -> Row | None:
        """The held-out samples of a scan, stacked; None where there are none."""
        rows = list(self._held_out.get(scan, {}).values())
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else None

    def example(self) -> Row:
        """Any sample: what the fields look like."""
        return next(iter(next(rows for rows in self._train.values() if rows).values()))

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._train.values()) + len(self._late)

    def _draw(self) -> Row:
        while True:
            if not self._order:
                scans = self._train if self.keep_all else [str(self._scan)]
                everything = [(scan, frame) for scan in scans for frame in self._train[scan]]
                self._order = [everything[i] for i in self._rng.permutation(len(everything))]
            scan, frame = self._order.pop()
            if frame in self._train.get(scan, {}):
                return self._train[scan][frame]
            late = self._late.pop((scan, frame), None)
            if late is not None:
                return late
