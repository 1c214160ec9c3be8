"""Dashboards as self-contained HTML: no scripts, no files, no network; light and dark; everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from tclib.features.dashboard import Dashboard, Example
from tclib.support.files import new_file

_STYLE = """
.tc {font: 14px/1.5 system-ui, sans-serif; color: CanvasText; background: Canvas; color-scheme: light dark;
     padding: 12px; max-width: 1100px}
.tc h2 {font-size: 17px; margin: 8px 0} .tc h3 {font-size: 14px; margin: 10px 0 4px}
.tc details {margin: 4px 0} .tc summary {cursor: pointer}
.tc .ex {font-family: ui-monospace, monospace; font-size: 12px; white-space: pre-wrap; margin: 3px 0 3px 12px}
.tc .at {color: GrayText; margin-right: 8px}
.tc .t {border-radius: 2px} .tc .c {outline: 1.5px solid CanvasText; font-weight: 700}
.tc table {border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums}
.tc td, .tc th {padding: 1px 8px; text-align: right} .tc td.k {font-family: ui-monospace, monospace; text-align: left}
.tc .cols {display: flex; flex-wrap: wrap; gap: 18px}
.tc .bars {display: flex; align-items: flex-end; height: 60px; gap: 1px}
.tc .bars i {background: #0072b2; flex: 1; min-height: 1px}
.tc .axis {display: flex; justify-content: space-between; font-size: 11px; color: GrayText}
"""


def dashboard_html(dashboard: Dashboard, title: str = "") -> str:
    """One feature as a fragment that can be shown in a notebook."""
    bands = dashboard.bands.sort_values("band", ascending=False)
    parts = [
        f"<style>{_STYLE}</style>",
        f"<div class='tc'><h2>{escape(title or dashboard.title)}</h2>",
        f"<div>fires on {dashboard.frequency:.4%} of tokens, at most {dashboard.max_activation:.3g}</div>",
        _histogram(dashboard),
        *(_band(dashboard, band) for band in bands.itertuples()),
        "<div class='cols'>",
        *(_table(name, table) for name, table in dashboard.tables.items()),
        "</div></div>",
    ]
    return "".join(parts)


def page(fragments: Sequence[str], title: str) -> str:
    """A whole document around fragments."""
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>body{{margin:0}}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(fragments)}</body></html>\n"


def save_page(path: Path, fragments: Sequence[str], title: str) -> Path:
    """Write `page` to a file, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(page(fragments, title), encoding="utf-8")
    return path


def _histogram(dashboard: Dashboard) -> str:
    counts = [count for _, _, count in dashboard.histogram]
    tallest = max(counts) or 1
    bars = "".join(
        f"<i style='height:{100 * count / tallest:.0f}%' title='{low:.3g} to {high:.3g}: {count} tokens'></i>"
        for low, high, count in dashboard.histogram
    )
    low, high = dashboard.histogram[0][0], dashboard.histogram[-1][1]
    axis = f"<div class='axis'><span>{low:.3g}</span><span>activation</span><span>{high:.3g}</span></div>"
    return f"<h3>Activations above zero (tallest bar: {tallest} tokens)</h3><div class='bars'>{bars}</div>{axis}"


def _band(dashboard: Dashboard, band: Any) -> str:
    examples = [example for example in dashboard.examples if example.band == band.band]
    heading = f"Between {band.low:.3g} and {band.high:.3g}: {band.share:.4%} of tokens, {len(examples)} shown"
    is_open = " open" if band.band == dashboard.bands["band"].max() else ""
    lines = "".join(_example(example, dashboard.max_activation) for example in examples)
    return f"<details{is_open}><summary>{heading}</summary>{lines}</details>"


def _example(example: Example, largest: float) -> str:
    spans = []
    for i, (token, act) in enumerate(zip(example.tokens, example.acts, strict=True)):
        shade = max(0.0, act) / largest
        style = f" style='background:rgba(255,140,0,{0.85 * shade:.2f})'" if act > 0 else ""
        kind = "t c" if i == example.centre else "t"
        text = escape(token).replace("\n", "⏎")
        spans.append(f"<span class='{kind}' title='{act:.3g}'{style}>{text}</span>")
    where = f"<span class='at'>{example.row}, {example.pos}: {example.activation:.3g}</span>"
    return f"<div class='ex'>{where}{''.join(spans)}</div>"


def _table(name: str, table: pd.DataFrame) -> str:
    key = "token" if "token" in table else "feature"
    lines = "".join(
        f"<tr><td class='k'>{escape(str(entry))}</td><td>{score:+.3f}</td></tr>"
        for entry, score in zip(table[key], table["score"], strict=True)
    )
    return f"<div><h3>{escape(name)}</h3><table>{lines}</table></div>"
