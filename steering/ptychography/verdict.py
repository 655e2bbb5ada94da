"""Trust in the prediction of a frame: its residuals compared with those of its model's validation frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steering.ptychography.noise import above_floor, no_evidence, poisson_floor
from steering.records import ModelVersion

BAD = 0.05
"""A frame whose trust is at most this is called bad: of frames like the validation frames, no more than this share."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """Trust in the predictions of n frames, by the held-out validation frames of their model version.

    With m validation frames, `by_residual` and `by_offset` (n,) are (1 + those of them that look as bad)/(m + 1), the
    conformal p-value (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005). For a frame like
    the validation frames P(value <= a) <= a, however few they are and whatever their distribution. NaN: no evidence,
    because the frame is no evidence (see `why_not`), no patch overlaps its own, or there are no validation frames.
    """

    by_residual: NDArray[np.float64]
    by_offset: NDArray[np.float64]
    floor: NDArray[np.float64]
    """(n,) the Poisson floor of each frame."""
    why_not: tuple[str, ...]
    """One for each frame: why it is no evidence, empty where it is."""

    @property
    def trust(self) -> NDArray[np.float64]:
        """(n,) 0..1, the two taken together: of frames like the validation frames at most that share looks as bad.

        Where both are known, twice the lower one (Bonferroni), at most 1. NaN where neither is.
        """
        both = np.stack([self.by_residual, self.by_offset])
        known = np.isfinite(both)
        lowest = np.where(known, both, 1.0).min(0) * np.maximum(known.sum(0), 1)
        return np.where(known.any(0), np.minimum(lowest, 1.0), np.nan)

    @property
    def bad(self) -> NDArray[np.bool_]:
        """(n,) True where trust is at most `BAD`. Without 39 validation frames no frame can be called bad."""
        return self.trust <= BAD


def judge(
    counts: NDArray,
    residual: NDArray,
    offset: NDArray,
    *,
    mask: NDArray[np.bool_] | None = None,
    version: ModelVersion,
) -> Verdict:
    """Judge predictions of a model version by their far-field residual (n,) and neighbour offset (n,).

    counts: (n, N, N). mask: bool (N, N), True = do not use. offset: radians, NaN where there is no neighbour.
    """
    floor = poisson_floor(counts, mask)
    why_not = no_evidence(counts, floor, mask)
    silent = np.array([bool(reason) for reason in why_not], bool)
    above = np.where(silent, np.nan, above_floor(residual, floor, version.noise_share))
    turned = np.where(silent, np.nan, np.abs(np.asarray(offset, np.float64)))
    return Verdict(
        by_residual=share_as_bad(above, np.array(version.validation_residuals)),
        by_offset=share_as_bad(turned, np.abs(np.array(version.validation_offsets))),
        floor=floor,
        why_not=why_not,
    )


def pair_offsets(
    patches: NDArray[np.complex64], labels: NDArray[np.complex64], weight: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Phase offsets (n,), radians, that pairs of patches would have if they overlapped: what to expect of neighbours.

    patches, labels: (n, h, w), predicted and true, all labels in one gauge. weight: (h, w). Each patch's constant phase
    against its label is compared with that of the next one, the last with the first; a single patch gives none.
    """
    if len(patches) < 2:
        return np.zeros(0)
    constant = (patches * labels.conj() * weight).sum((-2, -1))
    return np.angle(constant * np.roll(constant, 1).conj())


def share_as_bad(values: NDArray, sample: NDArray) -> NDArray[np.float64]:
    """(1 + how many of the sample (m,) are at least as high)/(1 + m) for each of the values (n,).

    NaN for NaN, and where the sample is empty.
    """
    known = np.sort(sample[np.isfinite(sample)])
    if not len(known):
        return np.full(len(values), np.nan)
    above = len(known) - np.searchsorted(known, values, side="left")
    return np.where(np.isfinite(values), (1 + above) / (1 + len(known)), np.nan)
