"""What the network forgot: the errors of each scan by version, as the first rank found them when it published one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from steering.runner.metrics import Metrics

_MOST = 16
"""Versions that are listed."""


def forgetting(metrics: Metrics) -> dict[str, Any]:
    """`forgetting` of summary.json, in JSON's types; empty where no version was judged on a scan.

    Validation errors on some frames of each scan that were never trained on: the mean of what training makes small,
    against their labels.
    versions: some of those that served, in order, those in service at the end of a scan among them. errors: by scan,
    one for each of these versions, None where the scan had no such frame yet. own_end: by scan, the version in service
    at its last frame.
    """
    served = set(metrics.campaign.served)  # the ranks judge a version beside the predictor, which may refuse it
    judged = {version: errors for version, errors in metrics.judged.items() if version in served}
    own_end = {scan: version for scan, version in metrics.own_end.items() if any(scan in by for by in judged.values())}
    versions = spread(sorted(judged), own_end.values(), _MOST)
    errors = {scan: [judged[version].get(scan) for version in versions] for scan in own_end}
    return {"versions": versions, "own_end": own_end, "errors": errors} if errors else {}


def spread(numbers: Sequence[int], wanted: Iterable[int], most: int) -> list[int]:
    """Those of the numbers that are wanted, and evenly spread others, up to `most` in all; in order."""
    chosen = {number for number in numbers if number in set(wanted)}
    others = [number for number in numbers if number not in chosen]
    room = min(len(others), max(0, most - len(chosen)))
    return sorted(chosen | {others[(2 * place + 1) * len(others) // (2 * room)] for place in range(room)})
