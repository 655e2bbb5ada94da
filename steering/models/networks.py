"""The networks by name: what a model version on disk is built from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from steering.models.probe_first import ProbeFirst
from steering.models.ptychonn import PtychoNN

Network = ProbeFirst | PtychoNN
_NETWORKS: dict[str, type[ProbeFirst] | type[PtychoNN]] = {"ProbeFirst": ProbeFirst, "PtychoNN": PtychoNN}


def build_network(name: str, hyperparameters: Mapping[str, float]) -> Network:
    """A network with fresh weights.

    Raises ValueError for hyperparameters that the network does not have, and for a name that is not one of ours: a
    model version never names code to be imported.
    """
    if name not in _NETWORKS:
        raise ValueError(f"found network {name!r}, expected one of {sorted(_NETWORKS)}")
    known = list(inspect.signature(_NETWORKS[name]).parameters)
    if not set(hyperparameters) <= set(known) or any(value != int(value) for value in hyperparameters.values()):
        raise ValueError(
            f"found hyperparameters {dict(hyperparameters)} for {name}, expected whole numbers for some of {known}"
        )
    return _NETWORKS[name](**{key: int(value) for key, value in hyperparameters.items()})
