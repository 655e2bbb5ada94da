"""How good a network is on held-out frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.learning.minibatch import Fields
from steering.learning.objectives import Reconstruction
from steering.learning.samples import Samples, stacked
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


def outputs_of(network: Network, fields: Fields, objective: Reconstruction) -> tuple[Tensor, Tensor]:
    """Predicted patches (n, h, w) complex, on the CPU, and their errors (n,)."""
    there = {name: value.to(network.optics.probe.device) for name, value in fields.items()}
    outputs = objective.outputs(network, there)
    return torch.polar(*outputs).cpu(), objective.error(outputs, there)


def errors_by_scan(network: Network, samples: Samples, patch: int) -> dict[str, float]:
    """Mean error on some held-out frames of each scan of this run that has any."""
    objective = Reconstruction(patch_weight(network.optics.modes().cpu().numpy(), patch))
    found = {}
    for name, scan in list(samples.scans.items())[-_SCANS:]:
        rows = list(scan.held_out.values())
        if rows and "/" not in name:
            some = stacked(rows[:: -(-len(rows) // _RECALLED)])
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
