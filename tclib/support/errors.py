"""The one error that users see."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message names the value, what was expected and what to do."""
