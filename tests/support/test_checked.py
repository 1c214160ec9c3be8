"""Arguments are what a function's annotations say, or are named in one sentence; the rest passes untouched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jaxtyping
import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.support.checked import checked
from tclib.support.declared import Count, Share, Whole, shown
from tclib.support.errors import InputError


class Owl:
    @checked
    def __init__(self, name: str, age: Count = 0) -> None:
        self.name, self.age = name, age

    @classmethod
    @checked
    def hatched(cls, name: str) -> Owl:
        return cls(name)


@checked
@dataclass(frozen=True)
class Nest:
    owls: tuple[Owl, ...]
    place: Path


@checked
def take(
    owl: Owl | None = None,
    n: Whole = 0,
    share: Share = 0.0,
    owls: Sequence[Owl] = (),
    any_order: Iterable[int] = (),
    by_name: Mapping[str, Owl | None] | None = None,
    path: Path | None = None,
    how: Literal["day", "night"] = "night",
    rows: Int[Tensor, "row pos"] | None = None,
    other: Float[Tensor, "row pos"] | None = None,
    table: Float[np.ndarray, "line"] | None = None,
    anything: Any = None,
) -> dict[str, Any]:
    """What it got."""
    return locals()


def test_what_is_given_arrives_as_it_is_annotated() -> None:
    owl = Owl("a", 1)
    assert take(owl)["owl"] is owl
    assert type(take(n=np.int8(3))["n"]) is int
    assert type(take(n=torch.tensor(3))["n"]) is int
    assert take(share="1e-3")["share"] == 0.001
    assert take(any_order=(i for i in range(3)))["any_order"] == (0, 1, 2)
    assert take(any_order={2: 0}.keys())["any_order"] == (2,)
    assert take(path="a/b")["path"] == Path("a/b")
    rows, marker = torch.zeros(2, 3, dtype=torch.int32), object()
    assert take(rows=rows)["rows"] is rows and take(anything=marker)["anything"] is marker
    assert Nest([owl], "here") == Nest((owl,), Path("here"))  # type: ignore[arg-type]
    assert Owl.hatched("b").age == 0  # a default, which is believed
    assert take.__doc__ == "What it got." and take.__name__ == "take"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"owl": "a"}, "owl 'a': expected an Owl"),
        ({"owl": [1] * 99}, "owl list: expected an Owl"),
        ({"n": 1.0}, "n 1.0: expected a whole number"),
        ({"n": "1"}, "n '1': expected a whole number"),
        ({"n": np.True_}, "n bool: expected a whole number"),
        ({"share": 2}, "share 2: expected at most 1"),
        ({"share": float("nan")}, "share nan: expected a finite number"),
        ({"owls": [Owl("a", 1), None]}, "owls.1 None: expected an Owl"),
        ({"owls": "ab"}, "owls 'ab': expected a list"),
        ({"owls": Owl("a", 1)}, "owls Owl: expected a list"),
        ({"any_order": "12"}, "any_order '12': expected a list"),
        ({"any_order": [0, 1.5]}, "any_order.1 1.5: expected a whole number"),
        ({"by_name": {"a": 3}}, "by_name 3: expected an Owl"),
        ({"by_name": []}, "by_name []: expected names and values"),
        ({"path": 3}, "path 3: expected a path"),
        ({"how": "noon"}, "how 'noon': expected 'day' or 'night'"),
        ({"rows": torch.zeros(2, 3)}, "rows float32 (2, 3): expected a tensor of whole numbers [row, pos]"),
        ({"rows": torch.zeros(2).int()}, "rows int32 (2): expected a tensor of whole numbers [row, pos]"),
        ({"rows": np.zeros((2, 3))}, "rows float64 ndarray (2, 3): expected a tensor of whole numbers"),
        ({"table": torch.zeros(2)}, "table float32 (2): expected an array of floating-point numbers [line]"),
    ],
)  # fmt: skip
def test_what_it_is_not_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        take(**given)
    assert str(caught.value).startswith(said)


def test_methods_and_classes_are_checked_too() -> None:
    for make, said in (
        (lambda: Owl(3), "name 3"),  # type: ignore[arg-type]
        (lambda: Owl("a", age=0), "age 0: expected at least 1"),
        (lambda: Owl.hatched(None), "name None"),  # type: ignore[arg-type]
        (lambda: Nest([3], "here"), "owls.0 3: expected an Owl"),  # type: ignore
        (lambda: Nest((), 3), "place 3: expected a path"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=said):
            make()


def test_sizes_of_a_caller_and_of_other_arguments_are_no_concern() -> None:
    rows = torch.zeros(2, 3, dtype=torch.int32)
    with jaxtyping.jaxtyped("context"):
        assert isinstance(torch.zeros(5, 7), Float[Tensor, "row pos"])
        assert take(rows=rows, other=torch.zeros(4, 4))["rows"] is rows


def test_a_value_is_shown_in_one_short_line() -> None:
    assert [shown(v) for v in (None, True, 1e-9, "a\nb", Path("a"))] == [
        "None", "True", "1e-09", r"'a\nb'", "'a'"]  # fmt: skip
    assert shown("x" * 99) == "str" and shown({"a": [1] * 99}) == "dict"
    assert shown(torch.zeros(2, 3).half()) == "float16 (2, 3)"
    assert shown(np.zeros(4)) == "float64 ndarray (4)"
    assert shown(Owl("a", 1)) == "Owl"
