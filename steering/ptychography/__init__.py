"""Far-field ptychography: forward model, reconstruction, stitching, trust, and comparison. numpy in, numpy out."""

from steering.ptychography.align import align, phase_correlation, phase_error
from steering.ptychography.filling import filled
from steering.ptychography.forward import backpropagate, diffract, shift_probe, simulate
from steering.ptychography.noise import (
    above_floor,
    expected_floor,
    no_evidence,
    poisson_floor,
    share_of_noise,
    thinned,
)
from steering.ptychography.prior_residual import prior_residual
from steering.ptychography.probe import add_modes, aim_probe, beam_diameter, rescale_probe, zone_plate
from steering.ptychography.refine import Refined, Refinement, refine
from steering.ptychography.settings import RefineSettings
from steering.ptychography.stitch import Stitcher, extract_patches, patch_weight
from steering.ptychography.tiles import TileCopy
from steering.ptychography.trust import far_field_residual, neighbour_offset, offset_of_shares
from steering.ptychography.verdict import BAD, Verdict, judge, pair_offsets, share_as_bad
from steering.records import Canvas

__all__ = [
    "BAD",
    "Canvas",
    "RefineSettings",
    "Refined",
    "Refinement",
    "Stitcher",
    "TileCopy",
    "Verdict",
    "above_floor",
    "add_modes",
    "aim_probe",
    "align",
    "backpropagate",
    "beam_diameter",
    "diffract",
    "expected_floor",
    "extract_patches",
    "far_field_residual",
    "filled",
    "judge",
    "neighbour_offset",
    "no_evidence",
    "offset_of_shares",
    "pair_offsets",
    "patch_weight",
    "phase_correlation",
    "phase_error",
    "poisson_floor",
    "prior_residual",
    "refine",
    "rescale_probe",
    "share_as_bad",
    "share_of_noise",
    "shift_probe",
    "simulate",
    "thinned",
    "zone_plate",
]
