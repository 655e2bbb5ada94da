"""What a workflow file puts together: the parts of a run, each built by its own constructor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from steering.campaign import CampaignSettings
from steering.inference import HoldOut, Predictor, PredictorSettings
from steering.labels.make import LabelSettings
from steering.learning import Reconstruction, TrainerSettings
from steering.learning.strategies import Strategy
from steering.models import Network, check_network
from steering.policies import Policy
from steering.ptychography import patch_weight
from steering.runner.watch import FROZEN_S
from steering.sources import Source


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run, whole. The fields of its parts are its configuration.

    What follows from other parts need not be said: the strategy's objective from network and probe, the number of ranks
    from the cluster, the names of the scans and the number of frames from the source.

    Raises ValueError for a network that does not fit the source's frames, see `check_network`, and for an objective
    that does not fit the network.
    """

    source: Source
    policy: Policy
    network: Network
    strategy: Strategy
    """Made without an objective it gets `Reconstruction`, weighted by the illumination of the network's patch."""
    ranks: int | tuple[int, int] | None = None
    """Training processes. A number: so many, and where one is lost another takes its place as soon as a worker is free.
    (least, most): begins with at least the first, takes what workers come, and never has more than the second. None:
    one on each worker with the resource trainer, also on those that come later."""
    frozen_s: float = FROZEN_S
    """Seconds within which a worker of the run that is frozen, cut off, or whose code holds the interpreter lock is
    noticed; it is then treated as lost. A stall of less than half of it never counts (see steering.runner.watch)."""
    silent_s: float = 30.0
    """Seconds, beside its own exposure, after which a frame that is due and does not come means that the source is
    silent: that is reported, and a source that can go on elsewhere is opened again (see steering.Source)."""
    unsteered_s: float | None = 10.0
    """Seconds without a sign of life of the runner after which the source goes on by itself with a safe raster, until
    another runner takes over: candidates row by row, as far as the limits allow them, never while paused or where a
    person approves decisions. None: it waits."""
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    campaign: CampaignSettings = field(default_factory=CampaignSettings)
    prediction: PredictorSettings = field(default_factory=PredictorSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)
    hold_out: HoldOut = field(default_factory=HoldOut)
    device: str | None = None
    """Where training, prediction and label making compute: `auto`, `cpu` or `cuda`, see `find_device`, decided on each
    worker; None: as the settings of each say, which is `auto` by default."""
    scans: tuple[str, ...] | None = None
    """Names of the scans to come, empty where they are not known; None: as the source says. The truth of each, if the
    source has one, is used to report errors."""
    start_from: tuple[Path, ...] = ()
    """Folders of earlier runs, or memories: the run begins with the model and optimiser of the first that has any, with
    the samples of all of them, each once, and predicts from the first frame. Given here they take the place of those
    of `steering run --from`."""
    memory: Path | None = None
    """A folder that the run begins with too, and adds its samples and model to when it has ended; made where it is not
    there. Given here it takes the place of that of `steering run --memory`."""
    checkpoint_s: float | None = 60.0
    """Seconds between two checkpoints of the whole run, from which `steering recover` goes on after the loss of all its
    processes: so much training may be lost. One is written when another scan begins, too. None: none is."""
    checkpoints: int = 2
    """How many are kept, the newest."""
    spool: bool = False
    """Write every frame to disk before it is acknowledged: for a source that cannot give frames again. Without it, such
    frames that came after the newest checkpoint are lost with the processes of a run."""
    tensorboard: bool = False
    """Write the run's figures as curves into its folder `tensorboard`, every two seconds (extra `tensorboard`)."""
    frames: int | None = None
    """Frames to come in all, for the progress display; None: as the source says."""

    def __post_init__(self) -> None:
        if (self.checkpoint_s is not None and not 0 < self.checkpoint_s < inf) or self.checkpoints < 1:
            raise ValueError(
                f"found checkpoint_s={self.checkpoint_s}, checkpoints={self.checkpoints}, expected seconds above 0 or "
                "None, and 1 or more"
            )
        if self.unsteered_s is not None and not 5 <= self.unsteered_s < inf:
            raise ValueError(f"found unsteered_s={self.unsteered_s}, expected 5 seconds or more, or None")
        least, most = self.ranks_range
        if not (least >= 1 and (most is None or least <= most) and self.frozen_s >= FROZEN_S):
            raise ValueError(
                f"found ranks={self.ranks}, frozen_s={self.frozen_s}; expected 1 rank or more, or (least, most) in "
                f"this order, and {FROZEN_S:g} seconds or more"
            )
        probe = self.source.probe
        check_network(self.network, window=self.source.geometry.shape[0], modes=len(probe))
        patch = int(self.network.hyperparameters["patch"])
        strategy = self.strategy.bound(Reconstruction(patch_weight(probe, patch)))
        weight = getattr(strategy.objective, "weight", None)
        if weight is not None and weight.shape != (patch, patch):
            raise ValueError(
                f"found an objective for patches of {tuple(weight.shape)} pixels, expected ({patch}, {patch}) as the "
                "network has: make the strategy without an objective"
            )
        starts = (self.start_from,) if isinstance(self.start_from, str | Path) else self.start_from
        derived = {
            **self._on_device(),
            "start_from": tuple(map(Path, starts)),
            "strategy": strategy,
            "scans": tuple(self.source.scans) if self.scans is None else self.scans,
            "frames": self.source.frames if self.frames is None else self.frames,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _on_device(self) -> dict[str, Any]:
        """The settings that name a device, with the experiment's own where it has one."""
        if self.device is None:
            return {}
        return {
            "trainer": replace(self.trainer, device=self.device),
            "prediction": replace(self.prediction, device=self.device),
            "labels": self.labels.on(self.device),
        }

    @property
    def ranks_range(self) -> tuple[int, int | None]:
        """The least number of training processes to begin with, and the most there may ever be; None: no limit."""
        if self.ranks is None:
            return 1, None
        return (self.ranks, self.ranks) if isinstance(self.ranks, int) else self.ranks

    @property
    def safe_campaign(self) -> CampaignSettings:
        """The campaign's settings, in which decisions stay inside the source's field where no other area is set."""
        limits = self.campaign.limits
        return replace(self.campaign, limits=replace(limits, area=limits.area or self.source.field))

    def predictor(self, store: Path) -> Predictor:
        """The description of the predictor, of versions in this store."""
        source = self.source
        return Predictor(
            field=source.field,
            geometry=source.geometry,
            probe=source.probe,
            policy=self.policy,
            store=store,
            hold_out=self.hold_out,
            truths=self.truths(),
            settings=self.prediction,
            network=type(self.network),
            frame_rate=source.frame_rate,
        )

    def truths(self) -> dict[str, Any]:
        """What the source knows of the scans beforehand: {scan: (object, canvas)}."""
        found = {scan: self.source.truth(scan) for scan in self.scans or ()}
        return {scan: truth for scan, truth in found.items() if truth is not None}
