"""Policies: where to measure next, for how long, and when a scan may end.

The contract is `Policy`. A new kind is one file here and one line in tests/test_policies.py.
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
