"""The figures of a run, for those who watch from outside, while it goes on: for Prometheus, and for TensorBoard."""

from __future__ import annotations

import asyncio

from distributed import Client

from steering.runner import prometheus
from steering.runner.assembly import Actors
from steering.runner.figures import families
from steering.runner.folder import RunFolder
from steering.runner.metrics import Metrics
from steering.runner.optional import Optional
from steering.runner.tensorboard import Curves

EVERY_S = 2.0
"""Between two exports: shorter than Prometheus usually asks."""


async def export(client: Client, folder: RunFolder, optional: Optional, metrics: Metrics, actors: Actors) -> None:
    """Export the figures of a run for ever. What fails is logged once; the run goes on."""
    address = curves = None
    if prometheus.installed():
        address = await optional.run("showing figures on /metrics", prometheus.show(client))
    if address is not None:
        folder.write_summary({"metrics": address})
    if metrics.experiment.tensorboard:
        made = asyncio.to_thread(Curves, folder.path / "tensorboard")
        curves = await optional.run("writing curves for TensorBoard", made)

    async def once() -> None:
        if actors.proxy.replacing:
            return
        figures = families(metrics, await actors.source.figures(), await actors.proxy.ask("figures"))
        if address is not None:
            await prometheus.leave(client, folder.name, figures)
        if curves is not None:
            await asyncio.to_thread(curves.add, figures)

    try:
        while address is not None or curves is not None:
            await optional.run("exporting figures", once())
            await asyncio.sleep(EVERY_S)
    finally:
        if curves is not None:
            curves.close()
