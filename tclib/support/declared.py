"""Parameters are declared once: a field of a frozen dataclass, its range, its docstring.

The same checks and the same sentence hold for a value from Python, from a preset or from the shell, and for
the arguments of a function that is `checked`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import index
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from tclib.support.errors import InputError

__all__ = [
    "NUMBER",
    "WHOLE",
    "Count",
    "Name",
    "Natural",
    "NonNegative",
    "NonPositive",
    "Positive",
    "Seed",
    "Share",
    "Whole",
    "declared",
    "descriptions",
    "in_words",
    "parse",
    "shown",
    "whole",
]


def _whole(value: Any) -> int:
    """An int of Python, numpy or torch: nothing that would have to be cut, guessed or read."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise PydanticCustomError("whole", "expected a whole number") from None


def whole(name: str, value: Any) -> int:
    """`value`, if it is a whole number. Errors: `InputError` that calls it `name`."""
    try:
        return _whole(value)
    except PydanticCustomError as error:
        raise InputError(f"{name} {shown(value)}: {error}") from None


def _number(value: Any) -> Any:
    """Anything but true and false: 1e-3 is a string to YAML."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "expected a valid number")
    return value


WHOLE, NUMBER = BeforeValidator(_whole), BeforeValidator(_number)
Whole = Annotated[int, WHOLE]
MOST = 2**63 - 1  # what a tensor can hold
Count = Annotated[int, Field(ge=1, le=MOST), WHOLE]
Natural = Annotated[int, Field(ge=0, le=MOST), WHOLE]
NonNegative = Annotated[float, Field(ge=0), NUMBER]
NonPositive = Annotated[float, Field(le=0), NUMBER]
Positive = Annotated[float, Field(gt=0), NUMBER]
Seed = Natural  # what torch's generators take
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
Name = Annotated[str, Field(min_length=1)]

T = TypeVar("T")
_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_UNKNOWN = "unexpected_keyword_argument"
_SHORT = 60  # characters of a value that a sentence repeats
_WORDS = {
    "Input should be ": "expected ",
    "Input is not a valid path for .*": "expected a path",
    "String should have at least 1 character": "expected a name",
    r"\w+ should have at least 1 item .*": "expected at least one",
    r"\w+ should have at most (\d+) items? .*": r"expected at most \1",
    "Field required": "expected a value",
    "a valid (tuple|list|frozenset)|an instance of Sequence": "a list",
    "'str' instances are not allowed .*": "expected a list",
    "(a valid dictionary|a valid mapping|a dictionary or an instance of .*)": "names and values",
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


def parse(cls: type[T], values: Any, what: str) -> T:
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
    place = list(first["loc"])
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
    return in_words(where, first)


def in_words(where: str, mistake: Mapping[str, Any]) -> str:
    """One of pydantic's errors: the place, its value and what was expected."""
    message = mistake["msg"]
    for theirs, ours in _WORDS.items():
        message = re.sub(theirs, ours, message)
    return f"{where} {shown(mistake['input'])}: {message}".lstrip()


def shown(value: Any) -> str:
    """A value as a sentence names it: itself if it is short, an array's type and shape, or its class."""
    if isinstance(value, bool | int | float) or value is None:
        return str(value)
    if getattr(value, "shape", ()) and hasattr(value, "dtype"):
        kind = "" if type(value).__name__ == "Tensor" else f" {type(value).__name__}"
        shape = ", ".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}{kind} ({shape})"
    if isinstance(value, PurePath):
        return repr(str(value))
    is_plain = type(value).__module__ in ("builtins", "torch")  # a dtype, a device, a container
    return text if is_plain and len(text := repr(value)) <= _SHORT else type(value).__name__


def _names(cls: Any, place: Sequence[int | str]) -> list[str]:
    """The fields of the declared class that stands at `place` within `cls`."""
    for name in place:
        if isinstance(name, str):
            annotation = cls.__pydantic_fields__[name].annotation
            cls = next(iter(get_args(annotation)), annotation)  # a tuple of them, or one
    return [field.name for field in fields(cls)]
