"""Ratings of a run's features, for spreadsheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tclib.blind.ratings import export_table, raters_of
from tclib.replication.comparison import STEP, read_comparison
from tclib.replication.presets import Preset
from tclib.support.errors import InputError
from tclib.support.files import check_name, new_file
from tclib.support.steps import MANIFEST


def export_ratings(
    preset: Preset, raters: Sequence[str], with_origin: bool, out: Path
) -> pd.DataFrame:
    """Write the ratings of some raters, or all, to a CSV, and return them; nothing of the run is made.

    Errors: `InputError` for a run without step 05, a rater without a file, ratings of other pages, or
    origins before all is rated.
    """
    folder = preset.step(STEP).folder
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} has no pages: run `{preset.command} --only 05` first")
    for rater in raters:
        check_name("rater", rater, "-_. ")
    there = raters_of(folder)
    if missing := [rater for rater in raters if rater not in there]:
        raise InputError(
            f"rater {missing[0]!r}: expected one of {', '.join(there) or 'none'}, whose ratings lie in {folder}"
        )
    if not there:
        raise InputError(f"{folder} has no ratings: rate in notebook 05, with `rater` set")
    comparison = read_comparison(folder)
    stores = [comparison.ratings(name) for name in raters or there]
    table = export_table(stores, comparison.origin if with_origin else None)
    with new_file(out) as temporary:
        # The mark by which spreadsheets know UTF-8.
        table.to_csv(temporary, index=False, encoding="utf-8-sig")
    return table
