"""Images of a run on a Tiled server, while the run goes on and when it is over. Needs the extra `tiled`.

Below the address: RUN / SCAN / phase, trust, model_version and all other images (y, x), and their axes y and x. The
metadata of SCAN hold `run_uid`, the uid of the bluesky run that measured it where there was one. An array is replaced
as its image changes. Who may write is said by the environment variable TILED_API_KEY, as everywhere in Tiled.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from steering.records import scan_name
from steering.runner.attach import UNREACHED, Attached, attach
from steering.runner.folder import RunFolder
from steering.runner.liveness import elsewhere, gone, whereabouts

logger = logging.getLogger(__name__)

EVERY_S = 5.0
"""Seconds between two versions of a live image."""


class TiledImages:
    """The images of one run at a Tiled server; for one thread."""

    def __init__(self, address: str, run: str) -> None:
        """address: of a container that may be written to. Raises ImportError without tiled, OSError where the server
        is not reached, or refuses."""
        client = _connected(address)
        self._context = client.context
        with _Explained():
            self._run = _of(client, run, {"made_by": "steering"})
        self._scans: dict[str, Any] = {}

    def close(self) -> None:
        """Leave the server."""
        self._context.http_client.close()

    def update(self, scan: str, image: xr.Dataset, uid: str | None = None) -> None:
        """Write the images of a scan in place of earlier ones. uid: of the bluesky run. Raises OSError."""
        with _Explained():
            if scan not in self._scans:
                self._scans[scan] = _of(self._run, scan, {"scan": scan})
            node = self._scans[scan]
            if uid is not None and node.metadata.get("run_uid") != uid:
                node.update_metadata({"run_uid": uid})
            for name, values in image.variables.items():
                if values.dims in (("y", "x"), ("y",), ("x",)):
                    unit = str(values.attrs.get("units", image.attrs.get("length_unit", "")))
                    _write(node, str(name), values.values, {"units": unit, "dims": list(values.dims)})


def publish(
    folder: RunFolder,
    address: str,
    *,
    every_s: float = EVERY_S,
    stopped: threading.Event | None = None,
    insecure: bool = False,
) -> int:
    """Follow a run to its end, or until `stopped`, with its images on a Tiled server; returns how many scans it has.

    insecure: as for `attach`. A run that cannot be reached for a while, and a server that fails, are logged and tried
    again; at the end a server raises OSError. Raises ImportError without tiled, PermissionError as `attach`.
    """
    images = TiledImages(address, folder.path.name)
    try:
        stopped, missed = stopped or threading.Event(), 0
        while not stopped.is_set() and folder.summary().get("status") == "running" and not gone(folder):
            try:
                with attach(folder, insecure=insecure) as run:
                    missed = 0
                    _follow(images, run, address, every_s, stopped)
            except PermissionError:
                raise
            except UNREACHED as error:  # it ends just now, or another runner goes on in a while
                missed += 1
                if elsewhere(whereabouts(folder)):
                    logger.warning("%s: only what is saved goes to the server: %s", folder.path, error)
                    break
                if missed == 2:
                    logger.warning("%s: the run is not reached, and is tried again: %s", folder.path, error)
                stopped.wait(every_s)
        scans, uids = folder.objects(), _uids(folder.summary())
        for scan, image in scans.items():
            images.update(scan, image, uids.get(scan))
        return len(scans)
    finally:
        images.close()


def _follow(images: TiledImages, run: Attached, address: str, every_s: float, stopped: threading.Event) -> None:
    """Until the run has ended. Raises what `Attached.live` does where it cannot be reached any more."""
    failed = False
    while not stopped.is_set() and not run.done:
        before, live, state = run.snapshot(), run.live(), run.snapshot()
        scan = state.get("scan")
        if live is not None and scan is not None and scan == before.get("scan"):
            try:
                images.update(str(scan), live, _uids(state).get(str(scan)))
                failed = False
            except OSError as error:
                if not failed:
                    logger.warning("%s: the live image is not written: %s", address, error)
                failed = True
        stopped.wait(every_s)


def _uids(figures: Mapping[str, Any]) -> Mapping[str, str]:
    """uids of bluesky's runs by scan; streams know these by their own names."""
    found = ((figures.get("streams") or {}).get("frames") or {}).get("runs")
    return {scan_name(name): uid for name, uid in found.items()} if isinstance(found, Mapping) else {}


def _of(parent: Any, name: str, metadata: dict[str, Any]) -> Any:
    """A container, made where it is not there."""
    return parent[name] if name in parent else parent.create_container(name, metadata=metadata)


def _write(node: Any, name: str, values: np.ndarray, metadata: dict[str, Any]) -> None:
    there = node[name] if name in node else None  # noqa: SIM401
    if there is not None and there.shape == values.shape and there.dtype == values.dtype:
        there.write(values)
        return
    if there is not None:
        node.delete_contents(name, external_only=False)
    node.write_array(values, key=name, metadata=metadata)


class _Explained:
    """What Tiled's client raises becomes an OSError in one sentence."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError):
            raise OSError(f"found a Tiled server that does not take it ({_short(error)}), expected it to") from error


def _connected(address: str) -> Any:
    try:
        from tiled.client import from_uri  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("Tiled needs its client, which is not installed: pip install 'steering[tiled]'") from error
    try:
        return from_uri(address)
    except Exception as error:  # of its HTTP client, of several kinds
        raise OSError(
            f"{address}: found no Tiled server that lets us in ({_short(error)}), expected one: is it running, and is "
            "TILED_API_KEY its key?"
        ) from error


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
