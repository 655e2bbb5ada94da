"""Frames that had arrived before everything was lost, and that the predictor which goes on lacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import xarray as xr

from steering.campaign import FramesLost
from steering.records.optional_parts import offers
from steering.runner.source_events import GoOn, SourceResume
from steering.runner.spool import spooled
from steering.sources import Source


def unlogged(resume: SourceResume) -> dict[int, tuple[str, str]]:
    """Frames that the source had spooled, and that no line of the log tells of: everyday events reach it a second
    later. By id: the name of their scan, and how the source calls it. None where the source goes on from its position:
    it hands these out anew."""
    found: dict[int, tuple[str, str]] = {}
    if not resume.placed:
        for chunk in spooled(resume.spooled, resume.knows):  # a chunk is logged whole
            scan = str(chunk.attrs["scan"])
            if scan not in resume.over:
                ids = chunk["frame"].values.tolist()
                found |= dict.fromkeys(ids, (scan, str(chunk.attrs.get("visit_of", scan))))
    return found


def given_again(
    source: Any, resume: SourceResume, new: Mapping[int, tuple[str, str]], lose: Callable[[FramesLost], None]
) -> Iterator[xr.Dataset]:
    """What had arrived and the predictor lacks, in the order of its arrival as far as that is known.

    new: those of which the log does not know, see `unlogged`. lose: told of frames that are in no spool, and that the
    source cannot give again.
    """
    wanted = {i: scan for i, scan in resume.handed.items() if i not in resume.there}
    wanted |= {i: scan for i, (scan, _) in new.items()}
    given = source.again(list(wanted)) if wanted and offers(source, "again") else iter(())
    for chunk in chain(spooled(resume.spooled), given):
        rows = [row for row, i in enumerate(chunk["frame"].values.tolist()) if i in wanted]
        if rows:
            part = chunk.isel(frame=rows)
            named = {wanted.pop(i) for i in part["frame"].values.tolist()}.pop()
            if named != part.attrs["scan"]:
                part.attrs |= {"scan": named, "visit_of": part.attrs["scan"]}
            yield part
    for scan in dict.fromkeys(wanted.values()):
        ids = tuple(i for i, mine in wanted.items() if mine == scan and i not in new)
        if ids:
            lose(FramesLost(time=time.time(), scan=scan, frame_ids=ids, reason="the source cannot give them again"))


def keep_again(source: Source, point: GoOn, keep: Callable[[xr.Dataset], None]) -> None:
    """Keep the frames that have arrived, as far as the source has them; another predictor may need them."""
    for scan, ids in point.handed.items():
        for chunk in source.again(ids):
            chunk.attrs |= {"scan": scan} | ({"visit_of": point.scans[scan]} if point.scans[scan] != scan else {})
            keep(chunk)


def not_known(chunk: xr.Dataset, known: Callable[[int], bool]) -> xr.Dataset | None:
    """The frames of a chunk that had not arrived before; None where all had. A stream that is joined anew may begin
    with what it has sent already."""
    new = [row for row, i in enumerate(chunk["frame"].values.tolist()) if not known(i)]
    if len(new) == chunk.sizes["frame"]:
        return chunk
    return chunk.isel(frame=new) if new else None
