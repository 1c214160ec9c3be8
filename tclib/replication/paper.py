"""The published figures, from data/paper."""

from __future__ import annotations

import csv

from tclib.support.errors import InputError
from tclib.support.places import DATA


def paper_table(name: str) -> list[dict[str, str]]:
    """The rows of data/paper/<name>.csv."""
    path = DATA / "paper" / f"{name}.csv"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.csv"))
        raise InputError(f"no paper table {name!r}: expected one of {', '.join(known)}")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
