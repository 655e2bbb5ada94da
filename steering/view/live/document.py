"""What the page draws, as one Bokeh document; written once for the page, Dask's dashboard and notebooks.

It holds no data: `static/page.js` puts into the sources, by their names, what the messages bring.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.embed.util import standalone_docs_json_and_render_items
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    HoverTool,
    LinearColorMapper,
    PanTool,
    Range1d,
    ResetTool,
    ScaleBar,
    WheelZoomTool,
)
from bokeh.palettes import Greys256, Viridis256
from bokeh.plotting import figure

INK = "#7a828c"
"""Lines and text until the page has set its own."""
COLOURS = ("#1f83c4", "#d9730d", "#2a9d6f", "#b85bb0", "#8a78d6", "#a8842c")
"""One for each scan, in order, and then from the first again: those of the report."""
ALARM = "#d64545"
_NOTHING = "rgba(0, 0, 0, 0)"

MAPS = {
    "amplitude": ("Amplitude, network", "gray"),
    "phase": ("Phase, network", "viridis"),
    "amplitude_refined": ("Amplitude, refined", "gray"),
    "phase_refined": ("Phase, refined", "viridis"),
    "trust": ("Trust", "viridis"),
    "pixel_residual": ("Residual", "viridis_r"),
}
"""By name of the map: its title, and the palette."""
_PALETTES = {"gray": Greys256, "viridis": Viridis256, "viridis_r": Viridis256[::-1]}
_CURVES = ("residual", "error")


def document() -> Document:
    """A new document: a root for each drawing, by its name."""
    made = Document(title="steering")
    x, y = Range1d(0, 1, name="map_x"), Range1d(1, 0, name="map_y")
    for name, (title, palette) in MAPS.items():
        made.add_root(_map(name, title, palette, x, y))
    made.add_root(_positions(x, y))
    time = Range1d(0, 10, name="time")
    for name in _CURVES:
        made.add_root(_curve(name, time))
    made.add_root(_buffer())
    return made


def embedded() -> dict[str, Any]:
    """The document in JSON's types, as BokehJS embeds it, and the element's id for each root: `drawing-NAME`."""
    roots = list(document().roots)
    docs, items = standalone_docs_json_and_render_items(roots)
    names = {root.id: root.name for root in roots}
    rendered = []
    for item in items:
        made = item.to_json()
        made["roots"] = {root: f"drawing-{names[root]}" for root in made["roots"]}
        rendered.append(made)
    return {"docs": docs, "items": rendered}


def _plot(name: str, **given: Any) -> figure:
    plot = figure(name=name, tools="", toolbar_location=None, **given)
    plot.background_fill_alpha = plot.border_fill_alpha = 0
    plot.outline_line_color = None
    plot.grid.grid_line_color, plot.grid.grid_line_alpha = INK, 0.18
    plot.axis.axis_line_color = plot.axis.major_tick_line_color = INK
    plot.axis.minor_tick_line_color = None
    plot.axis.major_label_text_color = plot.axis.axis_label_text_color = INK
    return plot


def _zoomable(plot: figure, dimensions: str = "both") -> None:
    pan, wheel = PanTool(dimensions=dimensions), WheelZoomTool(dimensions=dimensions, modifiers="ctrl")
    plot.add_tools(pan, wheel, BoxZoomTool(dimensions="both" if dimensions == "both" else "width"), ResetTool())
    plot.toolbar.active_drag, plot.toolbar.active_scroll = pan, wheel


def _square(name: str, x: Range1d, y: Range1d) -> figure:
    """A plot of the object, its frame a square, all with the same ranges."""
    plot = _plot(
        name,
        x_range=x,
        y_range=y,
        sizing_mode="scale_width",
        aspect_ratio=1,
        width=320,
        height=320,
        min_border=0,
    )
    plot.axis.visible = plot.grid.visible = False
    _zoomable(plot)
    plot.add_layout(
        ScaleBar(
            name=f"scale_{name}",
            range=x,
            unit="m",
            visible=False,
            location="bottom_left",
            background_fill_alpha=0.65,
            border_line_color=None,
            bar_line_color=INK,
            padding=4,
            margin=6,
        )
    )
    return plot


def _map(name: str, title: str, palette: str, x: Range1d, y: Range1d) -> figure:
    plot = _square(name, x, y)
    nothing = {"image": [np.full((2, 2), np.nan, np.float32)], "x": [0.0], "y": [0.0], "dw": [1.0], "dh": [1.0]}
    source = ColumnDataSource(nothing, name=f"image_{name}")
    mapper = LinearColorMapper(
        palette=_PALETTES[palette], low=0.0, high=1.0, nan_color=_NOTHING, name=f"colours_{name}"
    )
    drawn = plot.image("image", x="x", y="y", dw="dw", dh="dh", source=source, color_mapper=mapper)
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=[(title, "@image{0.000}")]), CrosshairTool(line_alpha=0.25))
    return plot


def _positions(x: Range1d, y: Range1d) -> figure:
    """Where it has scanned, where it will scan next, and what is proposed."""
    plot = _square("positions", x, y)
    measured = ColumnDataSource({"x": [], "y": [], "residual": []}, name="measured")
    mapper = LinearColorMapper(palette=Viridis256[::-1], low=0.0, high=1.0, nan_color=INK, name="colours_positions")
    plot.line("x", "y", source=measured, line_color=INK, line_alpha=0.35, line_width=0.7)
    dots = plot.scatter(
        "x",
        "y",
        source=measured,
        size=5,
        line_color=None,
        fill_color={"field": "residual", "transform": mapper},
        name="dots",
    )
    following = ColumnDataSource({"x": [], "y": []}, name="next")
    plot.line("x", "y", source=following, line_color=COLOURS[1], line_width=1.2)
    plot.scatter("x", "y", source=following, size=6, line_color=COLOURS[1], fill_color=None, line_width=1.5)
    proposed = ColumnDataSource({"x": [], "y": []}, name="proposed")
    plot.scatter(
        "x", "y", source=proposed, size=10, marker="diamond", line_color=ALARM, fill_color=ALARM, fill_alpha=0.25
    )
    area = ColumnDataSource({"left": [], "right": [], "top": [], "bottom": []}, name="area")
    plot.quad(source=area, fill_color=None, line_color=INK, line_dash="dashed")
    plot.add_tools(HoverTool(renderers=[dots], tooltips=[("residual", "@residual{0.000}")]))
    return plot


def _curve(name: str, time: Range1d) -> figure:
    """A figure of merit over the seconds of the run, with what has happened to the model."""
    values = Range1d(0, 0.1, name=f"range_{name}")
    plot = _plot(name, x_range=time, y_range=values, sizing_mode="stretch_width", height=230, min_border_left=52)
    plot.xaxis.axis_label = "seconds since the start"
    _zoomable(plot, "width")
    drift = ColumnDataSource({"left": [], "right": []}, name=f"drift_{name}")
    plot.vstrip(x0="left", x1="right", source=drift, fill_color=ALARM, fill_alpha=0.14, line_color=None)
    scans = ColumnDataSource({"time": []}, name=f"scans_{name}")
    plot.vspan(x="time", source=scans, line_color=INK, line_width=1)
    names = ColumnDataSource({"time": [], "y": [], "scan": []}, name=f"names_{name}")
    plot.text(
        "time",
        "y",
        text="scan",
        source=names,
        x_offset=4,
        text_font_size="11px",
        text_color=INK,
        name=f"words_{name}",
    )
    rollbacks = ColumnDataSource({"time": []}, name=f"rollbacks_{name}")
    plot.vspan(x="time", source=rollbacks, line_color=ALARM, line_dash="dashed", line_width=1.2)
    source = ColumnDataSource({"time": [], name: []}, name=f"curve_{name}")
    plot.scatter("time", name, source=source, size=3, color=COLOURS[0], line_color=None, fill_alpha=0.6)
    plot.line("time", name, source=source, line_color=COLOURS[0], line_alpha=0.7, line_width=1.2)
    if name == "residual":
        expected = ColumnDataSource({"time": [], "residual": []}, name="curve_expected")
        plot.step("time", "residual", source=expected, mode="after", line_color=INK, line_dash="dashed", line_width=1.4)
    for kind, marker, size, colour in (("versions", "inverted_triangle", 8, INK), ("labels", "square", 4, COLOURS[2])):
        marks = ColumnDataSource({"time": [], "y": [], "words": []}, name=f"{kind}_{name}")
        shown = plot.scatter("time", "y", source=marks, marker=marker, size=size, color=colour, line_color=None)
        plot.add_tools(HoverTool(renderers=[shown], tooltips="@words"))
    return plot


def _buffer() -> figure:
    """What the rehearsal buffers hold, by scan, over the steps of training."""
    steps, stored = Range1d(0, 10, name="steps"), Range1d(0, 10, name="samples")
    plot = _plot("buffer", x_range=steps, y_range=stored, sizing_mode="stretch_width", height=230, min_border_left=52)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "steps of training", "samples stored"
    _zoomable(plot, "width")
    source = ColumnDataSource({"xs": [], "ys": [], "colour": [], "scan": []}, name="stored")
    drawn = plot.patches("xs", "ys", source=source, fill_color="colour", line_color=None, fill_alpha=0.75)
    plot.add_tools(HoverTool(renderers=[drawn], tooltips="@scan"))
    return plot
