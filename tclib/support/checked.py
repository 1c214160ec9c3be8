"""Arguments of public functions are held against their annotations, by the sentences of declared classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache, reduce, wraps
from operator import or_
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from tclib.support.declared import NUMBER, WHOLE, in_words
from tclib.support.errors import InputError
from tclib.support.paths import expanded

F = TypeVar("F", bound=Callable[..., Any])
_CONFIG = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
_READ = (
    str,
    bytes,
    bool,
    PurePath,
    NoneType,
)  # what pydantic checks and reads; int and float as declared
_ARRAYS = {"Tensor": "a tensor", "ndarray": "an array"}
_ENTRIES = {"Int": "whole numbers", "Float": "floating-point numbers", "Bool": "true and false"}


def checked(function: F) -> F:
    """`function`, or a dataclass, which refuses arguments that are not what its annotations say.

    Numbers, names, paths and collections arrive as they are annotated: a numpy integer as an int, a str as a
    Path, any iterable as a tuple where `Iterable` is said. All else must be an instance of its class, an array
    of its type and rank. Defaults are believed. Errors: `InputError` that names the argument.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return function
    signature = inspect.signature(function)

    @cache
    def adapters() -> dict[str, TypeAdapter[Any]]:
        hints = get_type_hints(function, include_extras=True)
        hints.pop("return", None)
        return {name: TypeAdapter(_read(hint), config=_CONFIG) for name, hint in hints.items()}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, adapter in adapters().items():
            if name in bound.arguments:
                try:
                    value = adapter.validate_python(bound.arguments[name])
                except ValidationError as error:
                    raise InputError(_sentence(name, error)) from error
                bound.arguments[name] = expanded(value) if isinstance(value, Path) else value
        return function(*bound.args, **bound.kwargs)

    return cast(F, call)


def _sentence(name: str, error: ValidationError) -> str:
    first = error.errors()[0]
    inner = [str(part) for part in first["loc"] if isinstance(part, int)]
    return in_words(".".join([name, *inner]), first)


def _read(hint: Any) -> Any:
    """A type as pydantic is to read it: what it knows as it is, other classes by isinstance."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = args[0] if args[0] in (int, float) else _read(args[0])
        return Annotated[(inner, *args[1:])]
    if origin in (Union, UnionType):
        return reduce(or_, map(_read, args))
    if origin is Iterable:
        return tuple[_read(args[0]), ...]  # type: ignore[misc]
    if hint is Any or (origin in (None, Literal) and not isinstance(hint, type)):
        return hint
    if hint in (int, float):
        return Annotated[hint, WHOLE if hint is int else NUMBER]
    if origin is None:
        is_read = issubclass(hint, _READ) or hasattr(hint, "_fields")  # or a NamedTuple
        return hint if is_read else _instance(hint)
    if origin is Callable:
        return hint
    return origin[tuple(arg if arg is ... else _read(arg) for arg in args)]


def _instance(cls: type) -> Any:
    def check(value: Any) -> Any:
        if not _is_instance(value, cls):
            raise PydanticCustomError("instance", "expected {what}", {"what": _described(cls)})
        return value

    return Annotated[Any, PlainValidator(check)]


def _is_instance(value: Any, cls: Any) -> bool:
    if not hasattr(cls, "dim_str"):
        return isinstance(value, cls)
    import jaxtyping

    with jaxtyping.jaxtyped(
        "context"
    ):  # else a caller's sizes of the same names would have to be these
        return isinstance(value, cls)


def _described(cls: Any) -> str:
    if hasattr(cls, "dim_str"):
        entries = _ENTRIES[cls.dtype.__name__]
        return f"{_ARRAYS[cls.array_type.__name__]} of {entries} [{', '.join(cls.dim_str.split())}]"
    name = cls.__name__
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"
