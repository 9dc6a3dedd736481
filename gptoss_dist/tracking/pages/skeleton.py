"""The skeleton of a page: one HTML file with its style, its tables and its interactive figures inside.

    page = html_page("Run a", [Section("Loss", figure_html({"data": [...], "layout": {...}}))])

A figure is plain data as plotly.js takes it. plotly.js itself is copied into the page once, from the package plotly,
whose Python side is not imported: that would take seconds. A policy in the head of the page forbids all requests, so
whatever a run is called, the page fetches nothing and runs nothing of it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.printable import printable

COLOURS = ("#3b82c4", "#d9822b", "#3d9970", "#c2514e", "#8e6bbf", "#8c7a5c", "#d46a9f", "#6f8f2f", "#2fa5a5", "#7a869a")
"""Of curves, legible on white and on black."""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_NUMBER = re.compile(r"[-+−±]?[\d.,]+(e[-+]?\d+)?( ?(%|±.*|\(.*\)))?|–")


@dataclass(frozen=True)
class Section:
    """A part of a page under its heading."""

    title: str
    body_html: str
    """HTML whose texts are escaped already, such as what the functions below return."""


def html_page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """Return a whole page: head, style, a list of its sections, the sections, and plotly.js if there is a figure.

    Args:
        title: The page's title and first heading.
        sections: In their order.
        subtitle: A line below the title.

    Raises:
        ValueError: There is a figure, and the package plotly is not installed.
    """
    links = "".join(f'<a href="#s{n}">{escaped(section.title)}</a>' for n, section in enumerate(sections))
    bodies = "\n".join(
        f'<section id="s{n}"><h2>{escaped(section.title)}</h2>\n{section.body_html}\n</section>'
        for n, section in enumerate(sections)
    )
    has_figures = any('<div class="figure"' in section.body_html for section in sections)
    scripts = f"<script>{_plotly_js()}</script>\n<script>{_DRAW}</script>" if has_figures else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{escaped(title)}</title>\n<style>{_STYLE}</style></head>\n'
        f'<body><header><h1>{escaped(title)}</h1><p class="subtitle">{escaped(subtitle)}</p>\n'
        f"<nav>{links}</nav></header>\n"
        f"<main>{bodies}</main>\n{scripts}</body></html>\n"
    )


def escaped(text: object) -> str:
    """Return a text as HTML; what a terminal or a browser would obey is shown as escapes."""
    return html.escape(printable(text, lines=True))


def paragraphs_html(texts: Iterable[str]) -> str:
    """Return each text as a paragraph."""
    return "\n".join(f"<p>{escaped(text)}</p>" for text in texts)


def list_html(texts: Iterable[str]) -> str:
    """Return the texts as a list with bullets."""
    return f"<ul>{''.join(f'<li>{escaped(text)}</li>' for text in texts)}</ul>"


def table_html(headers: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; cells are texts, and those that look like numbers stand on the right."""
    head = "".join(f"<th>{escaped(header)}</th>" for header in headers)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def figure_html(figure: Mapping[str, Any], *, height: int = 460) -> str:
    """Return a place for a figure, which is drawn when the page is opened.

    Args:
        figure: `data` (traces) and `layout` of plotly.js; numbers may be numpy arrays, and what is not finite is a gap.
            Colours of text, grid and background are the page's.
        height: In pixels.
    """
    data = orjson.dumps({"data": figure["data"], "layout": figure.get("layout", {})}, option=orjson.OPT_SERIALIZE_NUMPY)
    text = data.decode().replace("<", "\\u003c")  # no text of a run ends the script
    return f'<div class="figure" style="height:{height}px"><script type="application/json">{text}</script></div>'


def _cell(value: object) -> str:
    text = str(value)
    kind = ' class="number"' if _NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{escaped(text)}</td>"


def _plotly_js() -> str:
    spec = find_spec("plotly")  # importing plotly takes a second, and only its file is wanted
    path = Path(spec.origin or "").parent / "package_data" / "plotly.min.js" if spec else None
    if path is None or not path.is_file():
        raise ValueError("the package plotly is not installed, which draws the curves of pages; pip install plotly")
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


_STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --soft: #5b6675; --line: #d7dce3; --page: #ffffff; --row: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ec; --soft: #9aa5b4; --line: #3a424d; --page: #15181d; --row: #1d2229; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1.6rem 4rem; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); font-size: 1.15rem; }
h3 { margin: 1.2rem 0 .4rem; font-size: 1rem; }
.subtitle { margin: .2rem 0 .6rem; color: var(--soft); }
nav a { margin-right: 1.1rem; color: inherit; }
p, li { max-width: 62rem; margin: .3rem 0; overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .28rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { max-width: 34rem; overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tbody tr:nth-child(even) { background: var(--row); }
pre { overflow-x: auto; padding: .7rem; background: var(--row); border: 1px solid var(--line); white-space: pre-wrap; }
.figure { width: 100%; margin: .4rem 0 1rem; }
"""

_DRAW = """
(function () {
  function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
  function dress(layout) {
    var ink = colour('--ink'), line = colour('--line');
    layout.paper_bgcolor = layout.plot_bgcolor = 'rgba(0,0,0,0)';
    layout.font = Object.assign({}, layout.font, {color: ink});
    layout.modebar = {bgcolor: 'rgba(0,0,0,0)', color: colour('--line'), activecolor: ink};
    layout.hoverlabel = {bgcolor: colour('--row'), font: {color: ink}};
    Object.keys(layout).concat('xaxis', 'yaxis').forEach(function (key) {
      if (/^[xy]axis\\d*$/.test(key)) {
        layout[key] = Object.assign({}, layout[key], {gridcolor: line, zerolinecolor: line, linecolor: line});
      }
    });
    (layout.updatemenus || []).forEach(function (menu) {
      menu.bgcolor = colour('--row'); menu.bordercolor = line;
      menu.font = {color: '#3b82c4'};  // plotly.js paints the chosen button white, whatever the page is
    });
    return layout;
  }
  var places = Array.prototype.slice.call(document.querySelectorAll('.figure'));
  places.forEach(function (place) {
    var figure = JSON.parse(place.firstChild.textContent);
    Plotly.newPlot(place, figure.data, dress(figure.layout), {displaylogo: false, responsive: true});
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', function () {
    places.forEach(function (place) { Plotly.relayout(place, dress(place.layout)); });
  });
})();
"""
