"""The language in which hypotheses are said: conditions on a position of a text, and claims made of them.

    OneOf        the token is one of a list
    OfClass      it is a number, has a capital, starts a word, ... (`vocabulary.CLASSES`)
    Spelt        it begins with, ends in or contains a text
    After        a token before it, at most `reach` away, meets a condition
    InClause     so many tokens stand between it and the last punctuation
    InDocument   it is the so-manieth token of its document
    Every, Not   conjunction and negation
    Claim        cases, of which one holds; each with the level of activation that it predicts

A condition never holds at BOS, and no BOS ever meets one. Earlier tokens are those of the row, not of the document:
rows are packed, and the model attends over the borders of documents, so what a feature reads may stand behind one.
Places in a clause and in a document are counted from the last BOS. Conditions go to plain dicts and come back
(`from_dict`), also from the three keys of `Predicate`, as older ledgers have them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import InstanceOf
from torch import Tensor
from torch.nn.functional import pad

from tclib.blind.predicates import Predicate
from tclib.blind.vocabulary import Spelling, TokenClass, Vocabulary
from tclib.support.declared import Count, Name, Natural, Positive, declared, shown
from tclib.support.errors import InputError

N_SAID = 12  # tokens of a list that a sentence names
MAX_DEPTH = 20
_BARE = {"has": "have", "begins": "begin", "ends": "end", "contains": "contain"}
_BARE |= {"comes": "come", "starts": "start", "continues": "continue"}
_CLASS_PHRASES: dict[TokenClass, str] = {
    "number": "is a number",
    "capital": "begins with a capital",
    "all capitals": "is in capitals",
    "letters": "is made of letters",
    "punctuation": "is punctuation",
    "white space": "is white space",
    "newline": "has a line break",
    "cyrillic": "has Cyrillic letters",
    "year": "ends a year",
    "word start": "starts a word",
    "word inside": "continues a word",
}
_SPELLING_PHRASES: dict[Spelling, str] = {
    "begins": "begins with",
    "ends": "ends in",
    "contains": "contains",
}


class Condition(ABC):
    """Something that is true or false at every position of a text."""

    kind: ClassVar[str]

    def holds(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        """Where it is true. Errors: `InputError` for tokens outside the vocabulary."""
        vocabulary.check(rows)
        return self.true(rows.long(), vocabulary)

    def predicted(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Float[Tensor, "row pos"]:
        """The activation that it predicts: above 0 where it holds."""
        return self.holds(rows, vocabulary).float()

    def true(self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary) -> Bool[Tensor, "row pos"]:
        """`holds`, of rows in int64 that have been checked."""
        return self._meets(rows, vocabulary) & (rows != vocabulary.bos_id)

    @abstractmethod
    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        """Where it is true; at BOS it does not matter."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How much it says: 1 for one token, a class or a spelling, 2 for a list, 1 more for what is around it."""

    @abstractmethod
    def phrase(self, vocabulary: Vocabulary) -> str:
        """What the token does, from its verb on."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""

    def in_words(self, vocabulary: Vocabulary) -> str:
        """A sentence."""
        return f"The feature is active where the token {self.phrase(vocabulary)}."

    @property
    def is_context_free(self) -> bool:
        """Whether the token at the position decides alone."""
        return True


@declared(frozen=True)
class OneOf(Condition):
    """The token is one of `ids`."""

    ids: frozenset[Natural]
    kind: ClassVar[str] = "one_of"

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        return vocabulary.listed(self.ids)[rows]

    @property
    def size(self) -> int:
        return 1 if len(self.ids) <= 1 else 2

    def phrase(self, vocabulary: Vocabulary) -> str:
        # A word with and without its space is one word here; a token of white space stays as it is.
        vocabulary.listed(self.ids)
        texts = [vocabulary.texts[i] for i in sorted(self.ids)]
        said = [repr(text) for text in sorted({text.strip() or text for text in texts})]
        if len(said) == 1:
            return f"is {said[0]}"
        more = f" … ({len(self.ids)} tokens)" if len(said) > N_SAID else ""
        return f"is one of {', '.join(said[:N_SAID]) or 'no tokens'}{more}"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "ids": sorted(self.ids)}


@declared(frozen=True)
class OfClass(Condition):
    """The token is of a class."""

    name: TokenClass
    kind: ClassVar[str] = "class"

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        return vocabulary.marked(rows, self.name)

    @property
    def size(self) -> int:
        return 1

    def phrase(self, vocabulary: Vocabulary) -> str:
        return _CLASS_PHRASES[self.name]

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name}


@declared(frozen=True)
class Spelt(Condition):
    """The token begins with, ends in or contains `text`; spaces in front of the token do not count."""

    how: Spelling
    text: Name
    kind: ClassVar[str] = "spelt"

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        return vocabulary.spelt(self.how, self.text)[rows]

    @property
    def size(self) -> int:
        return 1

    def phrase(self, vocabulary: Vocabulary) -> str:
        return f"{_SPELLING_PHRASES[self.how]} {self.text!r}"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "how": self.how, "text": self.text}


@declared(frozen=True)
class After(Condition):
    """A token before, at most `reach` away (0: anywhere in the row so far), meets a condition."""

    condition: InstanceOf[Condition]
    reach: Natural = 0
    kind: ClassVar[str] = "after"

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        away = distances(self.condition.true(rows, vocabulary))
        return away <= (self.reach or rows.shape[1])

    @property
    def size(self) -> int:
        return 1 + self.condition.size

    @property
    def is_context_free(self) -> bool:
        return False

    def phrase(self, vocabulary: Vocabulary) -> str:
        where = {0: "anywhere", 1: "right"}.get(self.reach, f"within {self.reach} tokens")
        return f"comes {where} after one that {self.condition.phrase(vocabulary)}"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "condition": self.condition.as_dict(), "reach": self.reach}


class _Between(Condition):
    """A place between two bounds, of which the upper may be none."""

    least: int
    most: int | None

    def __post_init__(self) -> None:
        _check_range(self.least, self.most)

    @property
    def size(self) -> int:
        return 2

    @property
    def is_context_free(self) -> bool:
        return False

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "least": self.least, "most": self.most}


@declared(frozen=True)
class InClause(_Between):
    """From `least` to `most` tokens stand between the token and the last punctuation, line break or BOS."""

    least: Natural = 0
    most: Natural | None = None
    kind: ClassVar[str] = "in_clause"

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        return _is_between(distances(vocabulary.ends_clause[rows]) - 1, self.least, self.most)

    def phrase(self, vocabulary: Vocabulary) -> str:
        if self.most is None:
            return f"has at least {self.least} tokens of its clause before it"
        if self.least == self.most:
            return f"has {self.least or 'no'} tokens of its clause before it"
        return f"has {self.least} to {self.most} tokens of its clause before it"


@declared(frozen=True)
class InDocument(_Between):
    """The token is from the `least`-th to the `most`-th of its document, the first behind BOS being 1."""

    least: Count = 1
    most: Count | None = None
    kind: ClassVar[str] = "in_document"

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        return _is_between(distances(rows == vocabulary.bos_id), self.least, self.most)

    def phrase(self, vocabulary: Vocabulary) -> str:
        if self.most is None:
            return f"is token {self.least} or later of its document"
        if self.least == self.most:
            return f"is token {self.least} of its document"
        return f"is one of tokens {self.least} to {self.most} of its document"


@declared(frozen=True)
class Every(Condition):
    """All parts hold."""

    parts: tuple[InstanceOf[Condition], ...]
    kind: ClassVar[str] = "every"

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("parts (): expected at least one condition")

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        return torch.stack([part.true(rows, vocabulary) for part in self.parts]).all(0)

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def is_context_free(self) -> bool:
        return all(part.is_context_free for part in self.parts)

    def phrase(self, vocabulary: Vocabulary) -> str:
        return ", and ".join(part.phrase(vocabulary) for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "parts": [part.as_dict() for part in self.parts]}


@declared(frozen=True)
class Not(Condition):
    """A condition does not hold."""

    condition: InstanceOf[Condition]
    kind: ClassVar[str] = "not"

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        return ~self.condition.true(rows, vocabulary)

    @property
    def size(self) -> int:
        return 1 + self.condition.size

    @property
    def is_context_free(self) -> bool:
        return self.condition.is_context_free

    def phrase(self, vocabulary: Vocabulary) -> str:
        positive = self.condition.phrase(vocabulary)
        if isinstance(self.condition, Every | Not | Claim):
            return f"is not one that {positive}"
        verb, rest = positive.split(" ", 1)
        return f"is not {rest}" if verb == "is" else f"does not {_BARE[verb]} {rest}"

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "condition": self.condition.as_dict()}


@declared(frozen=True)
class Case:
    """A condition and the activation that is predicted where it holds, in shares of the feature's maximum."""

    condition: InstanceOf[Condition]
    level: Positive = 1.0


@declared(frozen=True)
class Claim(Condition):
    """One case or another holds; where several do, the highest level is predicted."""

    cases: tuple[Case, ...]
    kind: ClassVar[str] = "claim"

    def __post_init__(self) -> None:
        if not self.cases:
            raise InputError("cases (): expected at least one case")

    def predicted(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Float[Tensor, "row pos"]:
        vocabulary.check(rows)
        held = [case.level * case.condition.true(rows.long(), vocabulary) for case in self.cases]
        return torch.stack(held).amax(0)

    def _meets(
        self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary
    ) -> Bool[Tensor, "row pos"]:
        return torch.stack([case.condition.true(rows, vocabulary) for case in self.cases]).any(0)

    @property
    def size(self) -> int:
        return sum(case.condition.size for case in self.cases)

    @property
    def is_context_free(self) -> bool:
        return all(case.condition.is_context_free for case in self.cases)

    def phrase(self, vocabulary: Vocabulary) -> str:
        levels = {case.level for case in self.cases}
        said = [
            case.condition.phrase(vocabulary)
            + (f" (at {case.level:.0%} of its maximum)" if len(levels) > 1 else "")
            for case in self.cases
        ]
        return "; or ".join(said)

    def as_dict(self) -> dict[str, Any]:
        cases = [{"condition": c.condition.as_dict(), "level": c.level} for c in self.cases]
        return {"kind": self.kind, "cases": cases}


def distances(here: Bool[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """How many tokens back the last marked position before each one is; more than the row has, if none is."""
    n_pos = here.shape[1]
    places = torch.arange(n_pos)
    last = torch.where(here, places, -n_pos - 1).cummax(1).values
    return places - pad(last, (1, 0), value=-n_pos - 1)[:, :-1]


def _is_between(
    values: Int[Tensor, "row pos"], least: int, most: int | None
) -> Bool[Tensor, "row pos"]:
    return values >= least if most is None else (values >= least) & (values <= most)


def _check_range(least: int, most: int | None) -> None:
    if most is not None and most < least:
        raise InputError(
            f"least {least}, most {most}: expected most to be {least} or more, or None"
        )


# -- from plain values -------------------------------------------------------------------------

_KINDS: dict[str, type[Any]] = {
    cls.kind: cls for cls in (OneOf, OfClass, Spelt, After, InClause, InDocument, Every, Not, Claim)
}


def from_predicate(predicate: Predicate) -> Condition:
    """The same in this language."""
    parts: list[Condition] = []
    if predicate.current is not None:
        parts.append(OneOf(predicate.current))
    if predicate.attended is not None:
        parts.append(After(OneOf(predicate.attended), predicate.reach))
    return parts[0] if len(parts) == 1 else Every(tuple(parts))


def from_dict(values: Any, vocabulary: Vocabulary | None = None) -> Condition:
    """A condition from what `as_dict` gave, or from a `Predicate`'s.

    With a vocabulary a list may also be of texts: {"kind": "one_of", "texts": [" All", "All"]}. Errors:
    `InputError` that names the first mistake.
    """
    return _condition(values, vocabulary, 0)


def _condition(values: Any, vocabulary: Vocabulary | None, depth: int) -> Condition:
    if depth > MAX_DEPTH:
        raise InputError(f"conditions within more than {MAX_DEPTH} others: expected fewer")
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise InputError(f"condition {shown(values)}: expected names and values, one of them kind")
    fields = dict(values)
    if "kind" not in fields and fields.keys() & {"current", "attended"}:
        return from_predicate(Predicate(**fields))
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"kind {shown(kind)}: expected one of {', '.join(_KINDS)}")
    if kind == "one_of" and "texts" in fields:
        fields["ids"] = _ids_of(fields.pop("texts"), vocabulary)

    def inner(one: Any) -> Condition:
        return _condition(one, vocabulary, depth + 1)

    if "condition" in fields:
        fields["condition"] = inner(fields["condition"])
    if "parts" in fields:
        fields["parts"] = tuple(map(inner, _listed("parts", fields["parts"])))
    if "cases" in fields:
        fields["cases"] = tuple(_case(one, inner) for one in _listed("cases", fields["cases"]))
    made: Condition = _KINDS[kind](**fields)
    return made


def _case(values: Any, inner: Callable[[Any], Condition]) -> Case:
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise InputError(f"case {shown(values)}: expected names and values: condition, level")
    fields = dict(values)
    if "condition" in fields:
        fields["condition"] = inner(fields["condition"])
    return Case(**fields)


def _listed(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise InputError(f"{name} {shown(values)}: expected a list")
    return list(values)


def _ids_of(texts: Any, vocabulary: Vocabulary | None) -> frozenset[int]:
    if vocabulary is None:
        raise InputError("texts of tokens without a vocabulary: give it, or ids")
    if not all(isinstance(text, str) for text in _listed("texts", texts)):
        raise InputError(f"texts {shown(texts)}: expected a list of texts")
    return vocabulary.ids_of(texts)
