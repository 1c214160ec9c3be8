"""Progress bars: for a terminal or a notebook, whichever it is; TCLIB_QUIET=1 switches them off."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
# In a notebook every refresh is several messages; a client that reads them only when the cell is done
# (nbval) would lose the cell's end in a flood.
SECONDS_BETWEEN_REFRESHES = 1.0


def is_quiet() -> bool:
    """Whether the environment asks for no progress bars."""
    return os.environ.get("TCLIB_QUIET", "0") not in ("", "0")


def progress(iterable: Iterable[T] | None, description: str, **options: Any) -> tqdm[Any]:
    """A tqdm bar over `iterable`, or one to be updated by hand."""
    return tqdm(
        iterable,
        desc=description,
        disable=is_quiet(),
        mininterval=SECONDS_BETWEEN_REFRESHES,
        maxinterval=SECONDS_BETWEEN_REFRESHES * 2,
        **options,
    )
