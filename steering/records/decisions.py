"""The records of the fast loop (predictions, decisions) and of the slow one (model versions)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

MEASURED = "measured while nobody decided"
"""The reason for which a policy need not name positions any more: the source has measured them by itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What a network predicts for some frames of one scan, and how well it agrees with them."""

    frame_id: NDArray[np.int64]
    """(frame,)"""
    scan: str
    position: NDArray[np.float64]
    """(frame, 2) of (y, x), object pixels."""
    amplitude: NDArray[np.float32]
    """(frame, y, x), transmission of the object in the patch around the position."""
    phase: NDArray[np.float32]
    """(frame, y, x), radians."""
    residual: NDArray[np.float32]
    """(frame,) far-field residual of the prediction: 0 agrees with the frame, 1 has nothing in common with it."""
    offset: NDArray[np.float32]
    """(frame,) phase offset to the overlapping neighbours, radians; NaN where there is no neighbour yet."""
    model_version: NDArray[np.int64]
    """(frame,) the version that predicted each frame."""
    prior_residual: NDArray[np.float32] | None = None
    """(frame,) far-field residual of the live image for each frame before that frame was added; None: not computed."""
    poisson_floor: NDArray[np.float64] | None = None
    """(frame,) the part of `residual` that photon noise alone leaves; NaN where it is not known. None: not computed."""

    def __post_init__(self) -> None:
        n = len(self.frame_id)
        if np.shape(self.position) != (n, 2):
            raise ValueError(
                f"found positions of shape {np.shape(self.position)}, expected ({n}, 2): (y, x) of each frame"
            )
        optional = [name for name in ("prior_residual", "poisson_floor") if getattr(self, name) is not None]
        for name in ("amplitude", "phase", "residual", "offset", "model_version", *optional):
            if len(getattr(self, name)) != n:
                raise ValueError(f"found {len(getattr(self, name))} rows of {name}, expected {n}: one per frame id")
        if self.amplitude.shape != self.phase.shape or self.amplitude.ndim != 3:
            raise ValueError(
                f"found amplitude {self.amplitude.shape} and phase {self.phase.shape}, expected two equal (frame, y, x)"
            )

    @property
    def patches(self) -> NDArray[np.complex64]:
        """(frame, y, x) complex: amplitude * exp(i phase)."""
        return (self.amplitude * np.exp(1j * self.phase)).astype(np.complex64)

    def rows(self, which: slice | NDArray[np.bool_]) -> Prediction:
        """The predictions of some of these frames."""
        of_frames = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scan"}
        return replace(self, **{name: v[which] for name, v in of_frames.items() if v is not None})


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """Where to measure next, for how long, or to stop; each with its reason."""

    positions: NDArray[np.float64]
    """(n, 2) of (y, x) in the geometry's length unit, in the order in which to measure."""
    reasons: tuple[str, ...]
    """One for each position; for a stop without positions, one."""
    dwell: NDArray[np.float64] | None = None
    """(n,) seconds at each position; None: the source's own frame time."""
    stop: bool = False
    """End the scan that it was made for once these positions are measured."""
    scan: int | None = None
    """Which scan it was made for, counted from 0 in the order in which they are measured; None: the one that is
    measured now. A policy need not say it."""

    def __post_init__(self) -> None:
        where = np.asarray(self.positions, np.float64)
        if where.size and (where.ndim != 2 or where.shape[1] != 2):
            raise ValueError(f"found positions of shape {where.shape}, expected (n, 2): (y, x) of each")
        where = where.reshape(-1, 2)
        object.__setattr__(self, "positions", where)
        if not len(where) and not self.stop:
            raise ValueError(
                "found a decision without positions that does not stop the scan, expected one or the other"
            )
        if not np.isfinite(where).all():
            raise ValueError("found a position that is not finite, expected (y, x) in the geometry's length unit")
        if len(self.reasons) != max(len(where), 1):
            raise ValueError(
                f"found {len(self.reasons)} reasons for {len(where)} positions, expected one each (one for a bare stop)"
            )
        if self.dwell is not None:
            dwell = np.asarray(self.dwell, np.float64)
            if dwell.shape != (len(where),) or not (np.isfinite(dwell) & (dwell > 0)).all():
                raise ValueError(f"found dwell {self.dwell}, expected {len(where)} positive times in seconds")
            object.__setattr__(self, "dwell", dwell)


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """The description of one published version: its network, its parents, its quality when it was published."""

    number: int
    """0 is the untrained network a campaign starts from; each publication adds one."""
    network: str
    """Name of the network's class."""
    hyperparameters: dict[str, float]
    """The arguments the network is built with."""
    parents: tuple[int, ...] = ()
    trained_on: dict[str, int] = field(default_factory=dict)
    """Labelled frames seen per scan, over all ranks, up to now."""
    steps: int = 0
    """Optimiser steps up to now."""
    validation_error: float | None = None
    """Error on labelled frames that are never trained on; None for the untrained network."""
    validation_residual: float | None = None
    """Median far-field residual on the same frames."""
    validation_residuals: tuple[float, ...] = ()
    """Far-field residual above its Poisson floor of each of these frames that has enough counts: the reference of
    trust."""
    noise_share: float = 1.0
    """Share of the Poisson floor that the residuals contain; the network fits the rest of the noise."""
    validation_offsets: tuple[float, ...] = ()
    """Phase offsets between pairs of their patches, radians: the reference for offsets between neighbours."""

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"found model version {self.number}, expected 0 or more")
        if not 0 <= self.noise_share <= 1:
            raise ValueError(f"found noise_share={self.noise_share}, expected 0..1")
