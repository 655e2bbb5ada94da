"""The figures of runs on /metrics of Dask's own web server, and as text for any other: of prometheus_client."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from distributed import Client, SchedulerPlugin

from steering.runner.figures import Family

_KEY = "steering-figures"
_OLD_S = 120.0
"""Figures that were not renewed for so long are of a run that is no more. Clocks of two hosts may differ by less."""


def installed() -> bool:
    """Whether the library is there; it comes with the extra `metrics`."""
    return importlib.util.find_spec("prometheus_client") is not None


def text(run: str, figures: Iterable[Family]) -> bytes:
    """The figures in Prometheus' text format. Raises ModuleNotFoundError without the extra `metrics`."""
    if not installed():
        raise ModuleNotFoundError("found no prometheus-client, expected it here: pip install 'steering[metrics]'")
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 - an extra

    registry = CollectorRegistry()
    registry.register(Collector(lambda: {run: list(figures)}))
    return generate_latest(registry)


class Collector:
    """What prometheus_client asks for figures, each time that somebody asks it."""

    def __init__(self, read: Callable[[], Mapping[str, list[Family]]]) -> None:
        """read: figures by name of the run, which becomes the label `run`."""
        self._read = read

    def collect(self) -> Iterator[Any]:
        """Its metric families; each has the samples of all runs."""
        from prometheus_client import core  # noqa: PLC0415 - an extra

        kinds = {"counter": core.CounterMetricFamily, "gauge": core.GaugeMetricFamily}
        found: dict[str, Any] = {}
        for run, figures in self._read().items():
            for each in figures:
                if each.kind == "histogram":
                    made = found.setdefault(each.name, core.HistogramMetricFamily(each.name, each.help, labels=["run"]))
                    made.add_metric([run], [(le, count) for (le,), count in each.samples], each.sum)
                    continue
                labels = ["run", *each.labels]
                made = found.setdefault(each.name, kinds[each.kind](each.name, each.help, labels=labels))
                for values, figure in each.samples:
                    made.add_metric([run, *values], figure)
        yield from found.values()


class _OnScheduler(SchedulerPlugin):
    """Has the scheduler's /metrics show what runs have left with it."""

    name = _KEY
    idempotent = True

    async def start(self, scheduler: Any) -> None:
        from prometheus_client import REGISTRY  # noqa: PLC0415 - an extra

        self._scheduler = scheduler
        self._collector = Collector(self._read)
        REGISTRY.register(self._collector)

    async def close(self) -> None:
        from prometheus_client import REGISTRY  # noqa: PLC0415 - an extra

        REGISTRY.unregister(self._collector)

    def _read(self) -> dict[str, list[Family]]:
        left = self._scheduler.task_metadata.get(_KEY, {})
        return {run: _families(published) for run, published in left.items() if _recent(published)}


async def show(client: Client) -> str:
    """Have the scheduler show figures; returns the address of its /metrics.

    Raises ImportError where it lacks the library, LookupError where it serves no pages, and what Dask raises.
    """
    await client.register_plugin(_OnScheduler())
    identity = await client.scheduler.identity(n_workers=0)
    return f"http://{urlsplit(identity['address']).hostname}:{identity['services']['dashboard']}/metrics"


async def leave(client: Client, run: str, figures: Iterable[Family]) -> None:
    """Leave the newest figures of a run with the scheduler."""
    published = {"time": time.time(), "figures": [each.to_json() for each in figures]}
    await client.set_metadata([_KEY, run], published)


def newest(client: Client, run: str) -> list[Family]:
    """What a run has left with the scheduler last. Raises LookupError where that was nothing, or long ago."""
    published = client.get_metadata([_KEY, run], None)
    if published is None or not _recent(published):
        raise LookupError(
            f"{run}: found no figures with the scheduler, expected those of a run that goes on, "
            "on a cluster that has the extra `metrics`"
        )
    return _families(published)


def _recent(published: Mapping[str, Any]) -> bool:
    return bool(time.time() - published["time"] < _OLD_S)


def _families(published: Mapping[str, Any]) -> list[Family]:
    return [Family.from_json(each) for each in published["figures"]]
