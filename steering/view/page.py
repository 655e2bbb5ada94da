"""The HTML of a report: one file that loads nothing, light or dark as the reader's system is."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from steering.view.pictures import DPI

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #1d2127; --soft: #626a74; --line: #e3e4e0;
  --accent: #1f6fa8; --good: #1c7a4f; --bad: #b3262a; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1b1f24; --ink: #e4e7ea; --soft: #98a1ab;
  --line: #2e343b; --accent: #69b1e6; --good: #5cc795; --bad: #ff8a85; --warn: #e6b45a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .5rem; }
p { margin: .25rem 0 .8rem; max-width: 78ch; }
.soft, figcaption { color: var(--soft); }
.badge { font-size: .8rem; font-weight: 600; padding: .16rem .6rem; border-radius: 1rem; vertical-align: .3rem;
  margin-left: .5rem; border: 1px solid currentColor; white-space: nowrap; }
.finished { color: var(--good); } .failed { color: var(--bad); } .interrupted { color: var(--warn); }
.running { color: var(--accent); }
.notice { border-left: 4px solid currentColor; background: var(--card); padding: .8rem 1.1rem; border-radius: 6px;
  margin: 1.1rem 0; }
.notice p { color: var(--ink); margin: 0; overflow-wrap: anywhere; } .notice strong { display: block; }
figure { margin: .6rem 0 1.2rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem 1rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .88rem; margin-top: .55rem; max-width: 90ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem; margin: .4rem 0 1rem; }
th, td { text-align: left; padding: .32rem 1.6rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--soft); } thead th { font-size: .85rem; }
td.number, th.number { text-align: right; white-space: nowrap; } td.best { font-weight: 700; }
.shades td, .shades thead th { padding: .34rem .7rem; text-align: right; border: 0; }
.shades td { border: 2px solid var(--page); border-radius: 5px; }
.shades td.own { outline: 2px solid var(--ink); outline-offset: -3px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); gap: 0 3rem; }
.bar { display: grid; grid-template-columns: 6rem 1fr 5.5rem; gap: .8rem; align-items: center; font-size: .92rem;
  margin: .28rem 0; }
.bar i { display: block; height: .72rem; background: var(--accent); border-radius: 3px; min-width: 2px; }
.bar b { font-weight: 500; text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
details summary { cursor: pointer; color: var(--accent); }
@media print { body { background: #fff; } figure { break-inside: avoid; } }
"""


def page(title: str, body: Sequence[str]) -> bytes:
    """The whole file. title: plain text; body: pieces of HTML. Its security policy forbids it to load anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(piece for piece in body if piece)
        + "\n</main>\n</body>\n</html>\n"
    ).encode()


def text(value: object) -> str:
    """Text as HTML, escaped: what a run wrote is never markup."""
    return html.escape(str(value), quote=True)


def picture(image: bytes | None, alt: str, caption: str = "") -> str:
    """A picture, PNG or transparent WebP, with its caption; nothing where there is none. alt, caption: plain text."""
    if image is None:
        return ""
    kind = "webp" if image.startswith(b"RIFF") else "png"
    pixels = int.from_bytes(image[24:27], "little") + 1 if kind == "webp" else int.from_bytes(image[16:20], "big")
    width = pixels * 100 // DPI  # text of one size, however wide the picture
    data = base64.b64encode(image).decode()
    under = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/{kind};base64,{data}" width="{width}" alt="{text(alt)}">{under}</figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, best: Sequence[int | None] = ()) -> str:
    """A table of plain text, names left, the rest right. best: for each row the column to set bold, or None."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col"{_right(place)}>{text(cell)}</th>' for place, cell in enumerate(head))
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    marks = [*best, *[None] * (len(rows) - len(best))]
    lines = "".join(f"<tr>{_cells(row, mark)}</tr>" for row, mark in zip(rows, marks, strict=True))
    return f'<div class="scroll"><table>{top}<tbody>{lines}</tbody></table></div>'


def _cells(row: Sequence[str], best: int | None) -> str:
    cells = [f'<th scope="row">{text(row[0])}</th>']
    for place, cell in enumerate(row[1:], 1):
        cells.append(f'<td class="number{" best" if place == best else ""}">{text(cell)}</td>')
    return "".join(cells)


def _right(place: int) -> str:
    return ' class="number"' if place else ""


def shades(head: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float | None, bool]]]]) -> str:
    """A table of cells shaded by a share, 0 to 1. rows: their name, and (text, share or None, outlined) by column."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(_shade(*cell) for cell in cells)}</tr>' for name, cells in rows
    )
    return (
        f'<div class="scroll"><table class="shades"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _shade(words: str, share: float | None, outlined: bool) -> str:
    paint = "" if share is None else f' style="background:rgb(217 115 13 / {0.06 + 0.5 * share:.2f})"'
    return f"<td{' class=own' if outlined else ''}{paint}>{text(words)}</td>"


def bars(values: Sequence[tuple[str, float, str]]) -> str:
    """Bars of (label, value, value in words), the longest as wide as the page allows."""
    longest = max((value for _, value, _ in values), default=0.0) or 1.0
    return "".join(
        f'<div class="bar"><span>{text(label)}</span><span><i style="width:{100 * value / longest:.2f}%"></i></span>'
        f"<b>{text(words)}</b></div>"
        for label, value, words in values
    )
