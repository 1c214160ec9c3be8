"""The one error that users see."""

from __future__ import annotations

from collections.abc import Iterable

N_LISTED = 3


class InputError(ValueError):
    """Bad input. The message names the value, what was expected and what to do."""


def listed(names: Iterable[object]) -> str:
    """Names in order, as many as a sentence bears."""
    shown = sorted(map(str, names))
    more = f" and {len(shown) - N_LISTED} more" if len(shown) > N_LISTED else ""
    return f"{', '.join(shown[:N_LISTED])}{more}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]
