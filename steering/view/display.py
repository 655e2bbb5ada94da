"""The live display of a run in the terminal, drawn from one snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from steering.runner.stream_lines import stream_lines, troubled

Snapshot = Mapping[str, Any]
"""Keys, all optional: elapsed_s, status, scan, scan_index, scans_total, frames_acquired, frames_expected,
frames_predicted, frames_dropped, streams, frames_per_s, version, versions_published, residual, residual_expected,
drift, training, steps, loss, labels, buffer_samples, buffer_share, remote_share, reason, paused, waits (for approval:
proposal, left_s, default), and events: pairs (elapsed_s, text), newest last. A missing key, or None, is unknown."""

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 100
UNKNOWN = Text("-")


def draw(snapshot: Snapshot, trust: Sequence[tuple[float, bool]] = ()) -> RenderableType:
    """The display of one snapshot; trust: (residual, drift) over the run so far, oldest first."""
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style="dim", no_wrap=True, width=7)
    rows.add_column(ratio=1, no_wrap=True)
    rows.add_row("sample", _sample(snapshot))
    rows.add_row("frames", _frames(snapshot))
    streams = snapshot.get("streams") or {}
    silent = troubled(streams)
    for line in stream_lines(streams):
        style = "bold red" if line.split(":")[0] in silent else ""
        rows.add_row("stream", Text(line, style=style, overflow="ellipsis"))
    rows.add_row("model", _model(snapshot))
    rows.add_row("trust", _trust(snapshot, trust))
    rows.add_row("train", _learning(snapshot))
    rows.add_row("buffer", _memory(snapshot))
    rows.add_row("next", Text(one_line(snapshot.get("reason") or "-"), style="italic", overflow="ellipsis"))
    if waits := waits_in_words(snapshot):
        rows.add_row("waits", Text(waits, style="bold yellow", overflow="ellipsis"))
    parts: list[RenderableType] = [rows]
    events = list(snapshot.get("events") or ())[-5:]
    if events:
        parts += [Rule(style="dim"), *(_event(when, text) for when, text in events)]
    status = str(snapshot.get("status") or "running")
    colour = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}.get(status, "cyan")
    state = state_in_words(snapshot)
    title = Text.assemble(("steering", "bold"), "  ", (state, f"bold {colour if state == status else 'yellow'}"))
    elapsed = Text(clock(snapshot.get("elapsed_s") or 0.0), style="bold")
    body = Padding(Group(*parts), (0, 1))
    panel = Panel(
        body, title=title, title_align="left", subtitle=elapsed, subtitle_align="right", box=box.ROUNDED, width=WIDTH
    )
    panel.border_style = "red" if snapshot.get("drift") and status == "running" else colour
    return _Narrow(panel)


def _event(when: float, text: str) -> Text:
    return Text.assemble((f"{clock(when):>7}  ", "dim"), one_line(text), overflow="ellipsis", no_wrap=True)


class _Narrow:
    """A panel at most WIDTH wide, narrower where the terminal is."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Panel]:
        self.panel.width = min(WIDTH, options.max_width)
        yield self.panel


def _sample(snapshot: Snapshot) -> Text:
    if snapshot.get("scan") is None:
        return Text("waiting for the first frame", style="dim")
    return Text.assemble((str(snapshot["scan"]), "bold"), (place(snapshot, "   "), "dim"))


def place(snapshot: Snapshot, before: str, after: str = "") -> str:
    """The number of the sample and how many there are, between two pieces of text; empty where it is unknown."""
    index, total = snapshot.get("scan_index"), snapshot.get("scans_total")
    if index is None:
        return ""
    return f"{before}{index + 1}{f' of {total}' if total else ''}{after}"


def _frames(snapshot: Snapshot) -> RenderableType:
    acquired, expected = snapshot.get("frames_acquired"), snapshot.get("frames_expected")
    if acquired is None:
        return UNKNOWN.copy()
    words = Text().append(f"{acquired:,}{f' of {expected:,}' if expected else ''}", style="bold")
    if snapshot.get("frames_per_s") is not None:
        words.append(f"   {snapshot['frames_per_s']:.0f}/s")
    if snapshot.get("frames_predicted") is not None:
        words.append(f"   {snapshot['frames_predicted']:,} predicted", style="dim")
    dropped = snapshot.get("frames_dropped")
    if dropped:
        words.append(f"   {dropped:,} dropped", style="bold red")
    if not expected:
        return words
    return _with_bar(min(acquired / expected, 1.0), words)


def _with_bar(share: float, words: Text) -> Table:
    line = Table.grid(padding=(0, 2))
    line.add_column(width=24)
    line.add_column(no_wrap=True)
    bar = ProgressBar(total=1.0, completed=share, width=24, complete_style="cyan", finished_style="green")
    line.add_row(bar, words)
    return line


def _model(snapshot: Snapshot) -> Text:
    if snapshot.get("version") is None:
        return UNKNOWN.copy()
    words = Text.assemble((f"version {snapshot['version']}", "bold"), " in service")
    if snapshot.get("versions_published") is not None:
        words.append(f"   {snapshot['versions_published']} published", style="dim")
    return words


def _trust(snapshot: Snapshot, trust: Sequence[tuple[float, bool]]) -> Text:
    residual, expected = snapshot.get("residual"), snapshot.get("residual_expected")
    if residual is None:
        return UNKNOWN.copy()
    words = sparkline(trust or [(residual, bool(snapshot.get("drift")))], width=24, expected=expected)
    words.append("  ")
    words.append(f"residual {residual:.3f}", style="bold")
    drift = drift_in_words(snapshot)
    if drift:  # first: a narrow terminal cuts the end off
        words.append("  ")
        words.append(f" {drift} ", style="bold white on red" if drift == "DRIFT" else "yellow")
    if expected is not None:
        words.append(f"  {expected:.3f} expected", style="dim")
        words.append("" if drift else "  no drift", style="green")
    return words


def drift_in_words(snapshot: Snapshot) -> str:
    """Whether drift is raised; empty where it is not. A run that has ended gives no alarm: it is judged by frames, and
    none comes any more, however good the last version is."""
    if not snapshot.get("drift"):
        return ""
    return "DRIFT" if (snapshot.get("status") or "running") == "running" else "drift not over at the last frame"


def state_in_words(snapshot: Snapshot) -> str:
    """The status; of a run that goes on also whether it is paused, or waits for a person."""
    status = str(snapshot.get("status") or "running")
    held = [*(["paused"] if snapshot.get("paused") else []), *(["waits for approval"] if snapshot.get("waits") else [])]
    return ", ".join(held) if held and status == "running" else status


def waits_in_words(snapshot: Snapshot) -> str:
    """What a run that goes on waits for from a person, and the command; empty where it waits for nothing."""
    if (snapshot.get("status") or "running") != "running":
        return ""
    found = ["`steering resume`"] if snapshot.get("paused") else []
    if waits := snapshot.get("waits"):
        left = f"{clock(waits['left_s'])} left, else {waits['default']}"
        found.append(f"`steering approve` or veto, {left}: {one_line(waits['proposal'])}")
    return "; ".join(found)


def sparkline(values: Sequence[tuple[float, bool]], width: int, expected: float | None = None) -> Text:
    """(value, alarm) pairs as `width` small bars from 0 upwards, red where there was an alarm."""
    cells = min(width, len(values))
    groups = [values[i * len(values) // cells : (i + 1) * len(values) // cells] for i in range(cells)]
    heights = [sum(value for value, _ in group) / len(group) for group in groups]
    top = max([*heights, 2 * (expected or 0.0), 1e-9])
    line = Text()
    for height, group in zip(heights, groups, strict=True):
        alarm = any(flag for _, flag in group)
        line.append(BARS[min(int(height / top * len(BARS)), len(BARS) - 1)], style="red" if alarm else "green")
    line.append(" " * (width - cells))
    return line


def _learning(snapshot: Snapshot) -> Text:
    if snapshot.get("steps") is None and snapshot.get("training") is None:
        return UNKNOWN.copy()
    training = snapshot.get("training")
    words = Text().append("● training" if training else "○ waiting ", style="bold cyan" if training else "dim")
    for key, form in (("steps", "   {:,} steps"), ("loss", "   loss {:.3g}"), ("labels", "   {:,} labels")):
        if snapshot.get(key) is not None:
            words.append(form.format(snapshot[key]), style="dim" if key == "labels" else "")
    return words


def _memory(snapshot: Snapshot) -> RenderableType:
    share, samples, remote = (snapshot.get(key) for key in ("buffer_share", "buffer_samples", "remote_share"))
    words = Text("" if samples is None else f"{samples:,} samples")
    if share is not None:
        words.append(f"  {share:.0%} full", style="dim")
    if remote is not None:
        words.append(f"  {remote:.0%} of other ranks", style="dim")
    if share is None:
        return words if words.plain else UNKNOWN.copy()
    return _with_bar(min(share, 1.0), words)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: object) -> str:
    """The text without line breaks."""
    return " ".join(str(text).split())
