"""Several runs on one page: key figures, errors and pictures side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from steering.records.whole_file import write_whole
from steering.runner.folder import RunFolder
from steering.view.curves import error_axes
from steering.view.forgetting import forgetting, largest_error, matrix
from steering.view.history import Curve, curves
from steering.view.page import page, picture, table, text
from steering.view.pictures import WIDTH, Shown, bare, figure, limits, png, shown, styled, webp
from steering.view.tables import key_figures, number, phase_errors, wall_times


def write_comparison(folders: Sequence[RunFolder], out: Path) -> Path:
    """Write a page that sets the runs side by side and return its path. Raises OSError where it cannot be written."""
    folders = list({folder.path.resolve(): folder for folder in folders}.values())  # each once
    names = _names(folders)
    summaries = dict(zip(names, (folder.summary() for folder in folders), strict=True))
    objects = dict(zip(names, (folder.objects() for folder in folders), strict=True))
    lines = {name: curves(images) for name, images in objects.items()}
    states = ", ".join(f"{text(name)} ({text(summary.get('status'))})" for name, summary in summaries.items())
    error_caption = "Dots: frames as the live model predicted them. Lines: running median over frames never trained on."
    body = [
        f'<header><h1>{len(folders)} runs side by side</h1><p class="soft">{states}</p></header>',
        _section("Phase error by sample", _errors(summaries)),
        _section(
            "Error over frames", picture(_curves(lines), f"Error over frames of {', '.join(names)}", error_caption)
        ),
        _section("Forgetting", _forgetting(summaries)),
        _section("Phase of the live object", picture(_objects(objects), f"Live phase of {', '.join(names)}")),
        _section("Key figures", _figures(summaries)),
        _section("Where the time went", _times(summaries)),
    ]
    out = Path(out).absolute()
    write_whole(out, page("comparison - steering", body))
    return out


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """The folders' own names; where two are called the same, their paths from the folder that has all of them."""
    short, paths = [folder.name for folder in folders], [folder.path.resolve() for folder in folders]
    if len(set(short)) == len(short):
        return short
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def _errors(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per sample and moment, one column per run, the lowest in bold."""
    errors = {name: phase_errors(summary) for name, summary in summaries.items()}
    rows, best = [], []
    moments = (("first", "at first"), ("own_end", "end of its scan"), ("run_end", "end of run"))
    for scan in dict.fromkeys(scan for by_scan in errors.values() for scan in by_scan):
        for key, words in moments:
            values = [by_scan.get(scan, {}).get(key) for by_scan in errors.values()]
            rows.append([f"{scan}, {words}", *(number(value, ".3f") for value in values)])
            best.append(_lowest(values))
        kept = [_ratio(by_scan.get(scan, {})) for by_scan in errors.values()]
        rows.append([f"{scan}, end of run / end of its scan", *(number(value, ".2f") for value in kept)])
        best.append(_lowest(kept))
    if not rows:
        return ""
    note = "Radians, by the network alone on frames never trained on. The ratio shows forgetting: 1 means none."
    return table(["", *summaries], rows, best=best) + f'<p class="soft">{note}</p>'


def _forgetting(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """A matrix for each run, all on one scale."""
    several = {name: found for name, summary in summaries.items() if (found := forgetting(summary)) is not None}
    if not several:
        return ""
    most = largest_error(several.values())
    note = (
        "Validation error by version: against the labels of some frames never trained on. Outlined: at the end of "
        "the scan itself."
    )
    matrices = "".join(f"<h3>{text(name)}</h3>{matrix(found, most)}" for name, found in several.items())
    return f'<p class="soft">{note}</p>{matrices}'


def _ratio(errors: Mapping[str, float | None]) -> float | None:
    end, own = errors.get("run_end"), errors.get("own_end")
    return end / own if end is not None and own else None


def _lowest(values: Sequence[float | None]) -> int | None:
    known = sorted((value, place) for place, value in enumerate(values, 1) if value is not None)
    return known[0][1] if len(known) > 1 and known[0][0] < known[1][0] else None


def _figures(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    return _side_by_side({name: dict(key_figures(summary)) for name, summary in summaries.items()})


def _times(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    return _side_by_side({name: {p: w for p, _, w in wall_times(s)} for name, s in summaries.items()})


def _side_by_side(columns: Mapping[str, Mapping[str, str]]) -> str:
    labels = list(dict.fromkeys(label for column in columns.values() for label in column))
    rows = [[label, *(column.get(label, number(None)) for column in columns.values())] for label in labels]
    return table(["", *columns], rows)


@styled
def _curves(lines: Mapping[str, list[Curve]]) -> bytes | None:
    known = {name: found for name, found in lines.items() if any(np.isfinite(c.error).any() for c in found)}
    if not known:
        return None
    columns = min(len(known), 2)
    rows = -(-len(known) // columns)
    drawing, axes = figure(rows, columns, height=3.0 * rows, sharex=True, sharey=True)
    top = 0.0
    for ax, (name, found) in zip(axes.flat, known.items(), strict=False):
        error_axes(ax, found)
        top = max(top, ax.get_ylim()[1])
        ax.set_title(name)
        ax.set_ylabel("phase error (rad)")
        ax.set_xlabel("frame")
        _name_scans(ax, found)
    axes.flat[0].set_ylim(0, top)
    for ax in axes.flat[len(known) :]:
        ax.set_visible(False)
    for ax in axes.flat[: len(known)][-columns:]:  # the lowest that is there, of each column
        ax.tick_params(labelbottom=True)
    return png(drawing)


def _name_scans(ax: Axes, found: Sequence[Curve]) -> None:
    for line, curve in zip(ax.get_lines()[1::2], found, strict=True):
        where = (float(curve.number[0]), 1.0)
        ax.annotate(
            curve.scan,
            where,
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            va="top",
            textcoords="offset points",
            color=line.get_color(),
            fontsize=9,
            fontweight="bold",
        )


@styled
def _objects(objects: Mapping[str, Mapping[str, xr.Dataset]]) -> bytes | None:
    """Rows: runs, and the truth where one knows it; columns: scans."""
    scans = list(dict.fromkeys(scan for images in objects.values() for scan in images))
    drawn = {name: {scan: shown(image) for scan, image in images.items()} for name, images in objects.items()}
    truths = {scan: _truth([drawn[name].get(scan, []) for name in drawn]) for scan in scans}
    rows = [
        (name, {scan: versions[0] for scan, versions in by_scan.items() if versions}) for name, by_scan in drawn.items()
    ]
    if not any(images for _, images in rows):
        return None
    known = {scan: truth for scan, truth in truths.items() if truth is not None}
    if known:
        rows.append(("truth", known))
    side = WIDTH / max(len(scans), 3)
    drawing, axes = figure(len(rows), len(scans), height=side * len(rows) + 0.3)
    for place, (row, (name, images)) in enumerate(zip(axes, rows, strict=True)):
        row[0].set_ylabel(name)
        for ax, scan in zip(row, scans, strict=True):
            bare(ax)
            if scan in images:
                candidates = [found[scan].phase for _, found in reversed(rows) if scan in found]
                low, high = limits(candidates[0])
                ax.imshow(images[scan].phase, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            if place == 0:
                ax.set_title(scan)
    return webp(drawing)


def _truth(runs: Sequence[Sequence[Shown]]) -> Shown | None:
    return next((version for versions in runs for version in versions if version.title == "truth"), None)
