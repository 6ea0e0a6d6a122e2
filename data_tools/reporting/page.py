"""Pieces of a self-contained HTML page: text made harmless, numbers, tables, bars and histograms.

Knows HTML, SVG and CSS, and nothing of corpora. Pages load nothing, run nothing, and follow the reader's dark or light
scheme. Every function returns markup; only `escape` and what is built on it may be given foreign text.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Characters that would not show, reorder what stands around them, or may not be in HTML: controls but for tab and new
# line, bidirectional and other invisible formatting, surrogates, noncharacters, tags. Joiners stay: scripts need them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\U000e0000-\U000e007f"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17))
    + "]"
)
_TICK_STEPS = (1, 2, 5, 10, 20, 25, 50)
_PLOT_HEIGHT = 200
_NO_BREAK = "\u00a0"
_MOST_X_LABELS = 9


@dataclass(frozen=True)
class Column:
    """A table's column. `kind`: "text", "number" or "bar". A narrow screen shows no `minor` columns."""

    title: str
    kind: str = "text"
    minor: bool = False

    @property
    def classes(self) -> str:
        return f"{self.kind} minor" if self.minor else self.kind


class Bar(NamedTuple):
    """Shares from 0 to 1: a bar, and what went away at its end."""

    share: float
    lost: float = 0.0


Cell = str | Bar


@dataclass(frozen=True)
class Series:
    """One colour of a histogram: `values[b]` is the height of bar b; they are shown as shares of their sum."""

    title: str
    unit: str
    values: Sequence[int]


def escape(text: str) -> str:
    """`text` as it is to be read: markup escaped, and characters that hide or reorder shown as their code points."""
    return _UNSEEN.sub(lambda found: f'<i class="c">U+{ord(found[0]):04X}</i>', html.escape(text))


def render_number(value: int) -> str:
    """1234567 -> `1,234,567`."""
    return f"{value:,}"


def render_short(value: float, unit: str = "") -> str:
    """Three significant digits: 12400 -> `12.4 k`, with a unit `12.4 kB`; counts below 1000 as they are."""
    prefix = 0
    while value >= 999.5 and prefix < len("kMGTPE"):
        value /= 1000
        prefix += 1
    if not prefix:
        return f"{value:.0f}{_NO_BREAK}{unit}" if unit else f"{value:.0f}"
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}{_NO_BREAK}{'kMGTPE'[prefix - 1]}{unit}"


def render_percent(part: int, whole: int) -> str:
    """`12.34 %`; only nothing is 0 and only all is 100."""
    if not whole:
        return "–"  # noqa: RUF001
    if part in (0, whole):
        number = str(100 * part // whole)
    else:
        percent = min(max(100 * part / whole, 0), 100)
        number = "< 0.01" if percent < 0.005 else "> 99.99" if percent > 99.995 else f"{percent:.2f}"
    return f"{number} %".replace(" ", _NO_BREAK)


def render_ratio(part: int, whole: int) -> str:
    """`4.312`."""
    return f"{part / whole:.3f}" if whole else "–"  # noqa: RUF001


def render_bar(bar: Bar) -> str:
    """A bar as wide as the room there is, filled as far as its share goes."""
    parts = [(0.0, 1.0, "track"), (0.0, bar.share, "s0"), (bar.share, bar.lost, "lost")]
    drawn = "".join(
        f'<rect class="{kind}" x="{100 * start:.2f}%" width="{100 * width:.2f}%" height="100%"/>'
        for start, width, kind in parts
        if width > 0
    )
    return f'<svg class="bar" aria-hidden="true">{drawn}</svg>'


def render_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], last_is_total: bool = False) -> str:
    """A table; cells of text and number columns are foreign text."""
    heads = "".join(f'<th scope="col" class="{column.classes}">{escape(column.title)}</th>' for column in columns)
    body = []
    for number, row in enumerate(rows):
        total = ' class="total"' if last_is_total and number == len(rows) - 1 else ""
        cells = "".join(
            _render_cell(column, cell, first=not i) for i, (column, cell) in enumerate(_pairs(columns, row))
        )
        body.append(f"<tr{total}>{cells}</tr>")
    lines = "\n".join(body)
    return f'<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def render_histogram(title: str, labels: Sequence[str], ranges: Sequence[str], series: Sequence[Series]) -> str:
    """Bars side by side for each bin. `labels` stand below some of the bars, `ranges` say what is in each bin.

    Places are in percent and sizes in pixels, so that the text keeps its size on any screen.
    """
    highest = max((100 * value / max(1, sum(one.values)) for one in series for value in one.values), default=0)
    step = next((step for step in _TICK_STEPS if highest <= 4 * step), _TICK_STEPS[-1])
    ticks = range(0, step * max(1, math.ceil(highest / step)) + 1, step)
    drawn = [f'<line x1="0" x2="100%" y1="{y}" y2="{y}"/>' for y in (_y(tick, ticks[-1]) for tick in ticks)]
    for number, one in enumerate(series):
        drawn += _render_series(one, number, len(series), ranges, ticks[-1])
    for index in range(0, len(labels), max(1, -(-len(labels) // _MOST_X_LABELS))):
        x = 100 * (index + 0.5) / len(labels)
        drawn.append(f'<text x="{x:.3f}%" y="{_PLOT_HEIGHT + 26}">{escape(labels[index])}</text>')
    axis = "".join(f'<text x="36" y="{_y(tick, ticks[-1]) + 4:.1f}">{tick} %</text>' for tick in ticks)
    legend = "".join(f'<li><i class="s{number}"></i>{escape(one.title)}</li>' for number, one in enumerate(series))
    size = f'height="{_PLOT_HEIGHT + 32}" font-size="11"'
    return (
        f'<figure><figcaption>{escape(title)}<ul class="legend">{legend}</ul></figcaption>\n<div class="plot">'
        f'<svg class="axis" width="42" {size} text-anchor="end" aria-hidden="true">{axis}</svg>'
        f'<svg class="bars" {size} text-anchor="middle" role="img" aria-label="{html.escape(title)}">\n'
        + "\n".join(drawn)
        + "\n</svg></div></figure>"
    )


def _render_series(one: Series, number: int, of: int, ranges: Sequence[str], top_tick: int) -> list[str]:
    total, bin_width, share_of_bin = sum(one.values), 100 / len(one.values), 0.84 / of
    bars = []
    for index, value in enumerate(one.values):
        if not value:
            continue
        x = (index + 0.08 + number * share_of_bin) * bin_width
        top = min(_y(100 * value / total, top_tick), _PLOT_HEIGHT + 9.0)  # what is there at all can be seen
        tip = f"{ranges[index]}: {value:,} {one.unit}, {render_percent(value, total)}"
        bars.append(
            f'<rect class="s{number}" x="{x:.3f}%" width="{share_of_bin * bin_width:.3f}%" y="{top:.1f}" '
            f'height="{_PLOT_HEIGHT + 10 - top:.1f}"><title>{escape(tip)}</title></rect>'
        )
    return bars


def render_page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_UNSEEN.sub(chr(0xFFFD), html.escape(title))}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _y(share: float, highest: int) -> float:
    """From the top, in pixels; the plot has 10 above it for half a line of text."""
    return 10 + _PLOT_HEIGHT * (1 - share / max(1, highest))


def _pairs(columns: Sequence[Column], row: Sequence[Cell]) -> list[tuple[Column, Cell]]:
    return list(zip(columns, row, strict=True))


def _render_cell(column: Column, cell: Cell, first: bool) -> str:
    content = render_bar(cell) if isinstance(cell, Bar) else escape(cell)
    if first:
        return f'<th scope="row" class="{column.classes}"><bdi>{content}</bdi></th>'
    return f'<td class="{column.classes}">{content}</td>'


_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --text: #1b1f24; --quiet: #5d6772; --line: #e2e5e8;
  --strong: #2563c9; --weak: #a9c5f2; --track: #eceef0; --mark: #b4461b; }
@media (prefers-color-scheme: dark) { :root { --ground: #121518; --card: #1a1e22; --text: #e7eaed; --quiet: #98a2ad;
  --line: #2c3238; --strong: #6ba1ff; --weak: #35568c; --track: #262b31; --mark: #f0925f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-text-size-adjust: 100%; }
header p { margin: 0; color: var(--quiet); }
h1 { margin: 0 0 .35rem; font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .25rem; font-size: 1.25rem; letter-spacing: -.005em; }
h2 + p { margin: 0 0 1rem; color: var(--quiet); max-width: 44rem; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.75rem 0 0; }
dl.tiles div { padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  min-width: 0; }
dl.tiles dt { font-size: .8rem; color: var(--quiet); }
dl.tiles dd { margin: 0; font-size: .8rem; color: var(--quiet); font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
dl.tiles dd.big { font-size: 1.5rem; line-height: 1.3; font-weight: 600; color: var(--text); }
.scroll { overflow-x: auto; margin: 0 -1.25rem; padding: 0 1.25rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line);
  font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--quiet); font-size: .8rem; white-space: nowrap; vertical-align: bottom; }
th[scope=row] { overflow-wrap: anywhere; min-width: 8rem; }
.number { text-align: right; white-space: nowrap; }
.bar { min-width: 7rem; width: 16%; }
tr.total > * { font-weight: 600; border-bottom: 0; }
svg.bar { display: block; width: 100%; height: .6rem; border-radius: .15rem; }
.track { fill: var(--track); }
.lost { fill: var(--mark); }
figure { margin: 1.25rem 0 0; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figcaption { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; justify-content: space-between; font-size: .9rem;
  font-weight: 600; }
ul.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0; padding: 0; list-style: none; font-weight: 400;
  color: var(--quiet); }
ul.legend i { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; border-radius: .15rem; }
.plot { display: flex; margin-top: .75rem; }
svg.axis { flex: none; }
svg.bars { flex: 1; min-width: 0; width: 100%; overflow: visible; }
.plot text { fill: var(--quiet); font-variant-numeric: tabular-nums; }
.plot line { stroke: var(--line); stroke-width: 1; }
.s0 { fill: var(--strong); background: var(--strong); }
.s1 { fill: var(--weak); background: var(--weak); }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
h3 small { font-weight: 400; font-size: .9rem; color: var(--quiet); }
article { margin: .5rem 0; padding: .6rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
article h4 { margin: 0; font-size: .8rem; font-weight: 400; color: var(--quiet); overflow-wrap: anywhere; }
pre { margin: .3rem 0 0; max-height: 14rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
i.c { font-style: normal; font-size: .85em; padding: 0 .2em; border-radius: .2em; color: var(--mark);
  background: var(--track);
  unicode-bidi: isolate; }
@media (max-width: 40rem) { body { padding-top: 1.5rem; } h1 { font-size: 1.6rem; } h2 { margin-top: 2.25rem; }
  th, td { padding: .4rem .5rem; } .plot { margin: .75rem -.5rem 0; }
  .minor { display: none; } }
@media print { body { max-width: none; padding: 0; } pre { max-height: none;
  } figure, article, tr { break-inside: avoid; } }
"""
