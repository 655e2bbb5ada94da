"""What a workflow file puts together: the parts of a run, each built by its own constructor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from steering.campaign import CampaignSettings
from steering.inference import HoldOut, PredictorSettings
from steering.labels.make import LabelSettings
from steering.learning import TrainerSettings
from steering.learning.strategies import Strategy
from steering.models import Network
from steering.policies import Policy
from steering.sources import Source


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run, whole. The fields of its parts are its configuration."""

    source: Source
    policy: Policy
    network: Network
    strategy: Strategy
    ranks: int = 2
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    campaign: CampaignSettings = field(default_factory=CampaignSettings)
    prediction: PredictorSettings = field(default_factory=PredictorSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)
    hold_out: HoldOut = field(default_factory=HoldOut)
    scans: tuple[str, ...] = ()
    """Names of the scans to come, where they are known: the truth of each, if the source has one, is used to report."""
    frames: int | None = None
    """Frames to come in all, where that is known: for the progress display."""

    @property
    def safe_campaign(self) -> CampaignSettings:
        """The campaign's settings, in which decisions stay inside the source's field where no other area is set."""
        limits = self.campaign.limits
        return replace(self.campaign, limits=replace(limits, area=limits.area or self.source.field))

    def truths(self) -> dict[str, Any]:
        """What the source knows of the scans beforehand: {scan: (object, canvas)}."""
        found = {scan: self.source.truth(scan) for scan in self.scans}
        return {scan: truth for scan, truth in found.items() if truth is not None}
