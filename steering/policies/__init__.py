"""Where to measure next. A policy orders a list of candidate positions; it starts no work and opens no file.

A policy has two verbs: `ingest(prediction, live)` tells it what was measured and how the live image looks now;
`suggest(n)` answers with a Decision of up to n positions, each with its reason, and a stop with a scan's last. Asked
again after a stop, it begins the next scan.
"""

from steering.policies.adaptive import Adaptive
from steering.policies.bluesky import BlueskyAgent
from steering.policies.candidates import Policy
from steering.policies.dwell import DwellRule
from steering.policies.gradient_residual import GradientResidual
from steering.policies.random import Random
from steering.policies.raster import Raster
from steering.policies.space_filling import SpaceFilling
from steering.policies.stop import StopRule

__all__ = [
    "Adaptive",
    "BlueskyAgent",
    "DwellRule",
    "GradientResidual",
    "Policy",
    "Random",
    "Raster",
    "SpaceFilling",
    "StopRule",
]
