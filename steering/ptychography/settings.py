"""The settings of `refine`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """How long and how carefully to refine."""

    passes: int = 10
    """Times that every frame is used, at most."""
    least_gain: float = 0.0
    """Share by which the median residual must fall in `gain_passes` passes: else refinement has converged and ends.
    0: all passes are done. Pty-Chi always does all of them."""
    gain_passes: int = 10
    """See `least_gain`."""
    batch: int = 32
    """Frames that update the object together; small is more work per pass and more progress."""
    alpha: float = 0.3
    """Regularisation of rPIE: 1 trusts only the brightest part of the probe (ePIE), near 0 every part alike."""
    probe_from_pass: int | None = None
    """The first pass (from 0) that improves the probe too; None keeps the probe as given."""
    probe_alpha: float = 0.5
    """The same regularisation for the probe."""
    positions_from_pass: int | None = None
    """The first pass (from 0) that corrects the positions too, each by a few pixels at most; None keeps them as given.
    The object must be there by then, if roughly."""
    engine: str = "rpie"
    """`rpie`, or `ptychi` for the LSQML engine of Pty-Chi where that is installed."""
    device: str = "auto"
    """Of rPIE: `auto`, a GPU where this process sees one; `cpu`; or `cuda`."""
    seed: int = 0
    """Of the order of frames."""

    def __post_init__(self) -> None:
        if self.passes < 0 or self.batch < 1:
            raise ValueError(f"found passes={self.passes} and batch={self.batch}, expected 0 or more and 1 or more")
        if not (0 <= self.least_gain < 1 and self.gain_passes >= 1):
            raise ValueError(
                f"found least_gain={self.least_gain}, gain_passes={self.gain_passes}, "
                "expected 0 <= least_gain < 1 and 1 or more passes"
            )
        if not (0 < self.alpha <= 1 and 0 < self.probe_alpha <= 1):
            raise ValueError(f"found alpha={self.alpha}, probe_alpha={self.probe_alpha}, expected both in (0, 1]")
        if self.engine not in ("rpie", "ptychi"):
            raise ValueError(f"found engine {self.engine!r}, expected 'rpie' or 'ptychi'")
        if self.engine == "ptychi" and self.positions_from_pass is not None:
            raise ValueError("found positions_from_pass with the engine 'ptychi', expected 'rpie', which corrects them")
