"""Parameters are declared once: a field of a frozen dataclass, its range, its docstring.

The same checks and the same sentence hold for a value from Python, from a preset or from the shell.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from tclib.support.errors import InputError

__all__ = [
    "Count",
    "Natural",
    "NonNegative",
    "NonPositive",
    "Positive",
    "Seed",
    "Share",
    "declared",
    "descriptions",
    "parse",
]

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
NonPositive = Annotated[float, Field(le=0)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what torch's generators take
Share = Annotated[float, Field(ge=0, le=1)]

T = TypeVar("T")
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_UNKNOWN = "unexpected_keyword_argument"
_WORDS = {
    "Input should be ": "expected ",
    "a valid tuple": "a list",
    "a valid dictionary": "names and values",
    "a valid mapping": "names and values",
    "greater than or equal to ": "at least ",
    "less than or equal to ": "at most ",
    "greater than ": "more than ",
}


def _declared(*, frozen: bool, kw_only: bool = False) -> Any:
    def decorate(cls: type) -> Any:
        made: Any = pydantic_dataclass(cls, frozen=frozen, kw_only=kw_only, config=_CONFIG)
        for name, info in made.__pydantic_fields__.items():
            # Where pydantic looks for the descriptions of fields that a subclass inherits.
            metadata = {**made.__dataclass_fields__[name].metadata, "description": info.description}
            made.__dataclass_fields__[name].metadata = MappingProxyType(metadata)
        unchecked = made.__init__

        def __init__(self: Any, *args: Any, **values: Any) -> None:
            try:
                unchecked(self, *args, **values)
            except ValidationError as error:
                raise InputError(_sentence(error, made)) from error

        made.__init__ = __init__
        return made

    return decorate


if TYPE_CHECKING:
    from dataclasses import dataclass as declared
else:
    declared = _declared


def parse(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """A declared class from the nested mappings of a file. Errors: `InputError` that names `what`."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{what}, {_sentence(error, cls)}") from error


def descriptions(cls: Any) -> dict[str, str]:
    """What each field of a declared class means."""
    return {field.name: field.metadata["description"] or "" for field in fields(cls)}


def _sentence(error: ValidationError, cls: Any) -> str:
    """The field, its value and what was expected, of the first mistake; misspelt names go first."""
    first = min(error.errors(), key=lambda one: one["type"] != _UNKNOWN)
    place, value = list(first["loc"]), first["input"]
    names = [field.name for field in fields(cls)]
    if place and isinstance(place[0], int) and place[0] < len(names):
        place[0] = names[place[0]]  # given by position
    where = ".".join(map(str, place))
    if first["type"] == _UNKNOWN:
        known = _names(cls, place[:-1])
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{where}: no such name; {advice}"
    if first["type"] == "value_error":  # from a class's own check
        return ": ".join(part for part in (where, str(first["ctx"]["error"])) if part)
    if first["type"] == "missing":
        return f"{where}: expected a value, found none"
    message = first["msg"]
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    shown = value if isinstance(value, int | float) else repr(value)
    return f"{where} {shown}: {message}"


def _names(cls: Any, place: Sequence[int | str]) -> list[str]:
    """The fields of the declared class that stands at `place` within `cls`."""
    for name in place:
        if isinstance(name, str):
            annotation = cls.__pydantic_fields__[name].annotation
            cls = next(iter(get_args(annotation)), annotation)  # a tuple of them, or one
    return [field.name for field in fields(cls)]
