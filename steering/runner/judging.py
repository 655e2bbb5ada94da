"""How good the versions of a run are on each of its scans, once it is over."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from typing import Any

from steering.inference import Score
from steering.models import ModelStore
from steering.runner.folder import RunFolder
from steering.runner.metrics import Metrics
from steering.runner.predictor_proxy import PredictorProxy

_SCORES = 18
"""Of versions on scans, in all: each takes up to half a second, and the end of the run waits for them."""


async def judge(metrics: Metrics, folder: RunFolder, proxy: PredictorProxy) -> dict[str, Any]:
    """`phase_error`, `phase_correlation` and `forgetting` of summary.json.

    By scan, errors of the network alone on frames that it was never trained on: by the versions in service at the
    scan's first frame (`first`), at its last one (`own_end`) and at the end of the run; and by more versions in turn
    (`forgetting`, with residuals, which need no truth). The correlations are those of a run of one scan.
    """
    stages = {scan: await _stages(metrics, proxy, scan) for scan in metrics.campaign.scans}
    published = [version.number for version in await asyncio.to_thread(ModelStore(folder.models).versions)]
    versions = spread(
        published, {v for stage in stages.values() for v in stage.values()}, _SCORES // max(1, len(stages))
    )
    scores: dict[str, dict[int, Score]] = {}
    for scan, stage in stages.items():
        scores[scan] = await proxy.ask("evaluate", scan, tuple({*versions, *stage.values()}))
    scores = {scan: found for scan, found in scores.items() if found}
    correlations: dict[str, float | None] = {}
    if len(stages) == 1:  # of several it would not be clear which
        for scan, found in _with_truth(scores).items():
            correlations["held_out"] = _finite(found[stages[scan]["run_end"]].phase_correlation)
            refined = await proxy.ask("evaluate_refined", scan)
            if refined is not None:
                correlations["refined"] = _finite(refined.phase_correlation)
    return {
        "phase_error": {
            scan: {
                **{stage: _finite(found[version].phase_error) for stage, version in stages[scan].items()},
                "versions": stages[scan],
            }
            for scan, found in _with_truth(scores).items()
        },
        "phase_correlation": correlations,
        "forgetting": {
            "versions": versions,
            "own_end": {scan: stages[scan]["own_end"] for scan in scores},
            "phase_error": {s: [_finite(f[v].phase_error) for v in versions] for s, f in _with_truth(scores).items()},
            "residual": {s: [_finite(f[v].residual) for v in versions] for s, f in scores.items()},
        },
    }


def spread(published: Sequence[int], wanted: Iterable[int], most: int) -> list[int]:
    """Those of the published versions that are wanted, and evenly spread others, up to `most` in all; in order."""
    chosen = {version for version in published if version in set(wanted)}
    others = [version for version in published if version not in chosen]
    room = min(len(others), max(0, most - len(chosen)))
    return sorted(chosen | {others[(2 * place + 1) * len(others) // (2 * room)] for place in range(room)})


async def _stages(metrics: Metrics, proxy: PredictorProxy, scan: str) -> dict[str, int]:
    """The version in service at a scan's first frame, at its last one, and at the end of the run."""
    first, last = await proxy.ask("versions_of", scan)
    return {"first": first, "own_end": metrics.own_end.get(scan, last), "run_end": metrics.campaign.version}


def _with_truth(scores: dict[str, dict[int, Score]]) -> dict[str, dict[int, Score]]:
    return {s: found for s, found in scores.items() if not all(math.isnan(f.phase_correlation) for f in found.values())}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
