"""How good a network is on held-out frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.learning.minibatch import Fields
from steering.learning.objectives import Reconstruction, evaluating
from steering.learning.samples import HELD_OUT, Row, Samples, stacked
from steering.models import Network
from steering.ptychography import (
    above_floor,
    far_field_residual,
    no_evidence,
    pair_offsets,
    patch_weight,
    poisson_floor,
    share_of_noise,
    thinned,
)

_SCANS, _RECALLED = 32, 16
"""Newest scans on which a version is judged, and frames of each at most."""
_TOGETHER = 64
"""Frames that a network is given at once."""


@torch.no_grad()
def outputs_of(network: Network, fields: Fields, objective: Reconstruction) -> tuple[Tensor, Tensor]:
    """Patches (n, h, w) complex, on the CPU, as the network predicts them where it serves, and their errors (n,)."""
    patches, errors = [], []
    with evaluating(network):
        for part in zip(*(value.split(_TOGETHER) for value in fields.values()), strict=True):
            there = {name: value.to(network.optics.probe.device) for name, value in zip(fields, part, strict=True)}
            outputs = objective.outputs(network, there)
            patches.append(torch.polar(*outputs).cpu())
            errors.append(objective.error(outputs, there))
    return torch.cat(patches), torch.cat(errors)


def judge(
    network: Network, served: Network, samples: Samples, scan: str, before: tuple[float, float] | None
) -> dict[str, Any]:
    """What a round's report says of a candidate on held-out frames: of the scan, and of the runs that this one was
    started from; the same of the weights in service. Empty where the scan has none.

    before: `earlier_errors` of the round before; None in the first.
    """
    held_out = samples.held_out(scan)
    if held_out is None:
        return {}
    served.optics.load_state_dict(network.optics.state_dict())
    objective = _objective(network, network.hyperparameters["patch"])
    earlier = {name: one.held_out for name, one in samples.scans.items() if "/" in name and one.held_out}
    errors = None
    if earlier:
        # Before the first judgement nothing was published: what is served is what the run began with.
        began = before[0] if before else _mean_error(served, earlier, objective)
        errors = (began, _mean_error(network, earlier, objective))
    return {
        "served_error": float(outputs_of(served, held_out, objective)[1].mean()),
        "earlier_errors": errors,
        **quality_of(network, held_out, objective),
    }


def _mean_error(network: Network, scans: Mapping[str, dict[int, Row]], objective: Reconstruction) -> float:
    """Over some frames of each scan, which may differ from scan to scan in the dtype of their counts."""
    some = [stacked(spread(rows, HELD_OUT // len(scans))) for rows in scans.values()]
    return float(torch.cat([outputs_of(network, fields, objective)[1] for fields in some]).mean())


def spread(rows: Mapping[int, Row], most: int) -> list[Row]:
    """So many of a scan's rows by frame id at most, at least one, evenly over the scan."""
    return [rows[frame] for frame in sorted(rows)[:: -(-len(rows) // max(1, most))]]


def _objective(network: Network, patch: int) -> Reconstruction:
    return Reconstruction(patch_weight(network.optics.modes().cpu().numpy(), patch))


def errors_by_scan(network: Network, samples: Samples, patch: int) -> dict[str, float]:
    """Mean error on some held-out frames of each scan of this run that has any."""
    objective, found = _objective(network, patch), {}
    for name, scan in list(samples.scans.items())[-_SCANS:]:
        if scan.held_out and "/" not in name:
            some = stacked(spread(scan.held_out, _RECALLED))
            found[name] = float(outputs_of(network, some, objective)[1].mean())
    return found


def quality_of(network: Network, fields: Fields, objective: Reconstruction) -> dict[str, Any]:
    """Quality of the candidate on held-out frames: its error, and the distributions that trust is measured against."""
    probe, mask = network.optics.modes().cpu().numpy(), network.optics.bad.cpu().numpy()
    predicted, error = outputs_of(network, fields, objective)
    patches, labels = predicted.numpy(), torch.polar(fields["amplitude"], fields["phase"]).numpy()
    counts = fields["counts"].numpy()
    residual, floor = far_field_residual(patches, counts, probe, mask), poisson_floor(counts, mask)
    fewer = thinned(counts, mask)
    again = outputs_of(network, {**fields, "counts": torch.from_numpy(fewer)}, objective)[0].numpy()
    share = share_of_noise(residual, floor, far_field_residual(again, fewer, probe, mask), poisson_floor(fewer, mask))
    evidence = np.array([not reason for reason in no_evidence(counts, floor, mask)])
    return {
        "error": float(error.mean()),
        "residual": float(np.median(residual)),
        "residuals": tuple(above_floor(residual, floor, share)[evidence].tolist()),
        "noise_share": share,
        "offsets": tuple(pair_offsets(patches[evidence], labels[evidence], objective.weight.numpy()).tolist()),
    }
