"""One published figure beside ours: how near counts as the same, and the verdict.

The tolerance comes from how the figure was printed, and from what it went through before:

    8.3952   half a unit of its last digit
    .2       Python's two significant digits, of which trailing zeros are dropped (0.3 is 0.30)
    float16  a whole step of float16 there: the authors' scores pass through it
    1954     nothing: an index or a count

and `FLOAT32` beside it, for sums in another order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

FLOAT32 = 1e-4  # of a value, or in absolute terms below 1: twelve layers on another machine
COLUMNS = ("source", "quantity", "paper", "ours", "difference", "tolerance", "verdict")
SILENT = "silent here"


def printed_tolerance(printed: str, printed_as: str = "decimals") -> float:
    """How far ours may be from a figure that was printed as `printed` (see the module).

    `printed_as` is decimals (as it stands), float16, or .2 and the like.
    """
    value = abs(float(printed))
    if printed_as == "float16":
        rounding = float(np.spacing(np.float16(value)))
    elif printed_as.startswith("."):
        last_digit = math.floor(math.log10(value or 1.0)) + 1 - int(printed_as[1:])
        rounding = 0.5 * 10.0**last_digit
    elif printed.isdigit():
        return 0.0
    else:
        mantissa, _, exponent = printed.partition("e")
        rounding = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return rounding + FLOAT32 * max(1.0, value)


def check_line(
    source: str,
    quantity: str,
    paper: float,
    ours: float,
    tolerance: float,
    is_silent: bool = False,
) -> dict[str, Any]:
    """One line of the table; the verdict is `reproduced` within the tolerance, else `mismatch`.

    A mismatch through a feature that does not fire here at all (`is_silent`) is named as such.
    """
    difference = ours - paper
    missed = SILENT if is_silent else "mismatch"
    verdict = "reproduced" if abs(difference) <= tolerance else missed
    return dict(
        zip(COLUMNS, (source, quantity, paper, ours, difference, tolerance, verdict), strict=True)
    )
