"""How good a run's network was on each of its scans, once it is over."""

from __future__ import annotations

import math
from typing import Any

from steering.inference import Score
from steering.runner.forgetting import forgetting
from steering.runner.metrics import Metrics
from steering.runner.predictor_proxy import PredictorProxy


async def judge(metrics: Metrics, proxy: PredictorProxy) -> dict[str, Any]:
    """`phase_error`, `phase_correlation` and `forgetting` of summary.json.

    By scan, errors of the network alone on frames that it was never trained on: by the versions in service at the
    scan's first frame (`first`), at its last one (`own_end`) and at the end of the run. The correlations are those of a
    run of one scan.
    """
    stages = {scan: await _stages(metrics, proxy, scan) for scan in metrics.campaign.scans}
    scores: dict[str, dict[int, Score]] = {}
    for scan, stage in stages.items():
        scores[scan] = await proxy.ask("evaluate", scan, tuple(set(stage.values())))
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
        "forgetting": forgetting(metrics),
    }


async def _stages(metrics: Metrics, proxy: PredictorProxy, scan: str) -> dict[str, int]:
    """The version in service at a scan's first frame, at its last one, and at the end of the run."""
    first, last = await proxy.ask("versions_of", scan)
    return {"first": first, "own_end": metrics.own_end.get(scan, last), "run_end": metrics.campaign.version}


def _with_truth(scores: dict[str, dict[int, Score]]) -> dict[str, dict[int, Score]]:
    return {s: found for s, found in scores.items() if not all(math.isnan(f.phase_correlation) for f in found.values())}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
