"""Whether a model that was trained at night takes the place of the one in service: pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is decided, and why."""

    publish: bool
    reason: str


def verdict(before: Mapping[str, float], after: Mapping[str, float], margin: float) -> Verdict:
    """Publish a model that is better on average over the scans and on no scan worse by more than the margin.

    before, after: errors of the model in service and of the candidate on the held-out frames of each scan, the same
    scans in both. margin: 0.05 allows 5 % on a single scan.
    """
    if not after or set(before) != set(after):
        raise ValueError(f"found errors on {len(before)} and {len(after)} scans, expected the same scans, at least one")
    broken = [scan for scan, error in after.items() if not math.isfinite(error)]
    if broken:
        return Verdict(publish=False, reason=f"its error is no number on {', '.join(broken)}")
    # A model in service whose error is no number is worse than any that has one.
    served = {scan: error if math.isfinite(error) else math.inf for scan, error in before.items()}
    worse = {scan: after[scan] / served[scan] - 1 for scan in after if after[scan] > (1 + margin) * served[scan]}
    if worse:
        said = ", ".join(f"{scan} by {100 * share:.0f} %" for scan, share in worse.items())
        return Verdict(publish=False, reason=f"it is worse than the model in service on {said}, allowed {margin:.0%}")
    mean = {name: sum(errors.values()) / len(errors) for name, errors in (("old", served), ("new", after))}
    said = (
        f"its mean error over {len(after)} scans is {mean['new']:.4g}, that of the model in service {mean['old']:.4g}"
    )
    return Verdict(publish=mean["new"] < mean["old"], reason=said)


def forgetting(matrix: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By how much the newest model is worse on each scan than the best one before it; 0 or below: nothing is forgotten.

    matrix: errors by scan of each model, oldest first, at least two.
    """
    *earlier, newest = matrix
    return {scan: error - min(one[scan] for one in earlier) for scan, error in newest.items()}
