"""Steering: continual learning that keeps a reconstruction network accurate while the beam is on.

What a workflow needs is here, as in `from steering import ER, Experiment, local, run`; a name is imported with what it
needs when it is first used, so that `import steering` alone loads neither torch nor dask. The rooms that the names come
from are, from the ground up: records, ptychography, models, policies, campaign, learning, inference, sources, clusters,
labels, runner, view.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.campaign import CampaignSettings as CampaignSettings, Limits as Limits
    from steering.clusters import (
        add_cluster as add_cluster,
        cluster as cluster,
        existing as existing,
        local as local,
        slurm as slurm,
    )
    from steering.inference import HoldOut as HoldOut, PredictorSettings as PredictorSettings
    from steering.learning import (
        Classification as Classification,
        Loop as Loop,
        Objective as Objective,
        Place as Place,
        Reconstruction as Reconstruction,
        Rehearsal as Rehearsal,
        Tally as Tally,
        TrainerSettings as TrainerSettings,
    )
    from steering.learning.strategies import (
        AGEM as AGEM,
        DER as DER,
        ER as ER,
        ERACE as ERACE,
        STRATEGIES as STRATEGIES,
        DERpp as DERpp,
        FromScratch as FromScratch,
        Incremental as Incremental,
        Strategy as Strategy,
    )
    from steering.models import (
        ModelStore as ModelStore,
        Network as Network,
        Optics as Optics,
        ProbeFirst as ProbeFirst,
        PtychoNN as PtychoNN,
        ResNet18 as ResNet18,
        ResNet50 as ResNet50,
    )
    from steering.policies import (
        Adaptive as Adaptive,
        BlueskyAgent as BlueskyAgent,
        DwellRule as DwellRule,
        GradientResidual as GradientResidual,
        Policy as Policy,
        Random as Random,
        Raster as Raster,
        SpaceFilling as SpaceFilling,
        StopRule as StopRule,
    )
    from steering.ptychography import (
        RefineSettings as RefineSettings,
        beam_diameter as beam_diameter,
        zone_plate as zone_plate,
    )
    from steering.records import (
        Canvas as Canvas,
        Decision as Decision,
        Field as Field,
        Geometry as Geometry,
        ModelVersion as ModelVersion,
        Prediction as Prediction,
        Source as Source,
        Travel as Travel,
        make_chunk as make_chunk,
    )
    from steering.runner import (
        Experiment as Experiment,
        FinalSettings as FinalSettings,
        LabelSettings as LabelSettings,
        LiveSettings as LiveSettings,
        RunFolder as RunFolder,
        attach as attach,
        hand_in as hand_in,
        on_ranks as on_ranks,
        run as run,
        start as start,
    )
    from steering.sources import (
        ORIENTATIONS as ORIENTATIONS,
        ReadSettings as ReadSettings,
        Replay as Replay,
        SimulatedBeamline as SimulatedBeamline,
        Stage as Stage,
        read_probe as read_probe,
        read_recording as read_recording,
        sample as sample,
    )
    from steering.view.live.served import LivePage as LivePage
    from steering.view.notebook import LivePanel as LivePanel
    from steering.view.progress import Progress as Progress

__version__ = "0.1.0"

_NAMES = {
    "campaign": "CampaignSettings Limits",
    "clusters": "add_cluster cluster existing local slurm",
    "inference": "HoldOut PredictorSettings",
    "labels": "",
    "learning": "Classification Loop Objective Place Reconstruction Rehearsal Tally TrainerSettings",
    "learning.strategies": "AGEM DER ER ERACE STRATEGIES DERpp FromScratch Incremental Strategy",
    "models": "ModelStore Network Optics ProbeFirst PtychoNN ResNet18 ResNet50",
    "policies": "Adaptive BlueskyAgent DwellRule GradientResidual Policy Random Raster SpaceFilling StopRule",
    "ptychography": "RefineSettings beam_diameter zone_plate",
    "records": "Canvas Decision Field Geometry ModelVersion Prediction Source Travel make_chunk",
    "runner": "Experiment FinalSettings LabelSettings LiveSettings RunFolder attach hand_in on_ranks run start",
    "sources": "ORIENTATIONS ReadSettings Replay SimulatedBeamline Stage read_probe read_recording sample",
    "view": "",
    "view.live.served": "LivePage",
    "view.notebook": "LivePanel",
    "view.progress": "Progress",
}
"""What each room hands out here; tests/test_names.py holds this and what type checkers read above together."""
_HOMES = {name: f"steering.{room}" for room, names in _NAMES.items() for name in names.split()}
_ROOMS = {room for room in _NAMES if "." not in room}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - strings they are


if not TYPE_CHECKING:  # to a type checker a name that is not above is a mistake

    def __getattr__(name: str) -> Any:
        """A public name or a room, imported when it is first asked for."""
        if name in _ROOMS:
            return importlib.import_module(f"steering.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'steering' has no attribute {name!r}")
        found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
