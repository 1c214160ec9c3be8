"""What hypotheses say of a tokenizer: the text of every token, and the classes and spellings of tokens as masks.

Computed once from a model's tokenizer, so that a condition on a text is a few tensor operations. Most classes are
those of a token by itself; three look at the tokens in front of it, as a reader would:

    year              the token ends a number of four digits from 1000 to 2099, however it is cut (" 1735"; " 17", "35")
    word start        it begins with a letter, behind white space or behind what is no letter
    word inside       it begins with a letter, right behind a letter

Spaces in front of a token belong to no spelling. BOS is of no class.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError, listed

TokenClass = Literal[
    "number",
    "capital",
    "all capitals",
    "letters",
    "punctuation",
    "white space",
    "newline",
    "cyrillic",
    "year",
    "word start",
    "word inside",
]
CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)
Spelling = Literal["begins", "ends", "contains"]
YEARS = (1000, 2100)
MAX_AFFIX = 4
_MAX_DIGITS = 5  # a number of more is no year either


def _is_punctuation(text: str) -> bool:
    return bool(text) and all(unicodedata.category(letter)[0] in "PS" for letter in text)


# Of a token's text without the spaces in front of it, but for white space.
_OF_TEXT: dict[TokenClass, Callable[[str], bool]] = {
    "number": lambda text: text.isascii() and text.isdigit(),
    "capital": lambda text: text[:1].isupper(),
    "all capitals": lambda text: len(text) > 1 and text.isalpha() and text.isupper(),
    "letters": str.isalpha,
    "punctuation": _is_punctuation,
    "cyrillic": lambda text: any("\u0400" <= letter <= "\u04ff" for letter in text),
}
_SPELT: dict[Spelling, Callable[[str, str], bool]] = {
    "begins": str.startswith,
    "ends": str.endswith,
    "contains": str.__contains__,
}


class Affixes(NamedTuple):
    """Beginnings or ends of one length, and which of them each token has; −1 for none."""

    how: Spelling
    texts: tuple[str, ...]
    of_token: Int[Tensor, "token"]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The text of every token, with the spaces in front of it, and the token that opens documents.

    Errors: `InputError` for a BOS outside it.
    """

    texts: tuple[str, ...] = field(repr=False)
    bos_id: int
    _masks: dict[tuple[str, str], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.bos_id < len(self.texts):
            raise InputError(
                f"BOS {self.bos_id} of {len(self.texts)} tokens: expected 0 to {len(self.texts) - 1}"
            )

    @classmethod
    def of(cls, lm: LanguageModel) -> Vocabulary:
        """The vocabulary of a model."""
        return cls(tuple(lm.token_strings(range(lm.d_vocab))), lm.bos_id)

    def __len__(self) -> int:
        return len(self.texts)

    def check(self, rows: Int[Tensor, "row pos"]) -> None:
        """Raise `InputError` for tokens outside the vocabulary."""
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise InputError(
                f"rows with tokens {int(rows.min())} to {int(rows.max())}: the vocabulary has ids from "
                f"0 to {len(self) - 1}; give that of the model which the rows are for"
            )

    @cached_property
    def stripped(self) -> tuple[str, ...]:
        """Texts without the spaces in front of them; BOS has none."""
        return tuple("" if i == self.bos_id else t.lstrip() for i, t in enumerate(self.texts))

    def ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """The tokens of these texts, spaces included; texts that are no single token are left out.

        Errors: `InputError` if none of them is a token.
        """
        wanted = tuple(texts)
        found = frozenset(i for text in wanted for i in self._ids_by_text.get(text, ()))
        if not found:
            raise InputError(
                f"none of {listed(map(repr, wanted)) or 'no texts'} is a token: expected texts of single "
                "tokens, with the space in front of them where they have one"
            )
        return found

    @cached_property
    def _ids_by_text(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, text in enumerate(self.texts):
            found.setdefault(text, []).append(i)
        return found

    # -- masks over the vocabulary ----------------------------------------------------------

    def listed(self, ids: Iterable[int]) -> Bool[Tensor, "token"]:
        """The tokens of these ids. Errors: `InputError` for an id outside the vocabulary."""
        mask, found = torch.zeros(len(self), dtype=torch.bool), sorted(ids)
        if found and not 0 <= found[0] <= found[-1] < len(self):
            wrong = found[0] if found[0] < 0 else found[-1]
            raise InputError(f"token id {wrong}: the vocabulary has ids from 0 to {len(self) - 1}")
        mask[torch.tensor(found, dtype=torch.long)] = True
        return mask

    def spelt(self, how: Spelling, text: str) -> Bool[Tensor, "token"]:
        """The tokens which begin with, end in or contain a text; upper and lower case differ."""
        test = _SPELT[how]
        return self._mask(how, text, lambda: [test(own, text) for own in self.stripped])

    def of_class(self, name: TokenClass) -> Bool[Tensor, "token"]:
        """The tokens of a class as they are by themselves, with nothing in front of them."""
        if name in _OF_TEXT:
            return self._mask("class", name, lambda: [_OF_TEXT[name](t) for t in self.stripped])
        lone = torch.arange(len(self))[:, None]
        return self._cached("lone", name, lambda: self.marked(lone, name)[:, 0])

    def marked(self, rows: Int[Tensor, "row pos"], name: TokenClass) -> Bool[Tensor, "row pos"]:
        """Where a text has tokens of a class."""
        if name in _OF_TEXT:
            return self.of_class(name)[rows]
        if name == "year":
            return self._ends_year(rows)
        if name in ("white space", "newline"):
            return self._blank(name)[rows]
        behind_letter = _shifted(self._ends_in_letter[rows]) & ~self._is_spaced[rows]
        begins = self._begins_with_letter[rows]
        return begins & (behind_letter if name == "word inside" else ~behind_letter)

    def _blank(self, name: TokenClass) -> Bool[Tensor, "token"]:
        bos, texts = self.bos_id, self.texts
        if name == "newline":
            return self._mask("class", name, lambda: ["\n" in t for t in texts])
        blank = [bool(t) and t.isspace() and i != bos for i, t in enumerate(texts)]
        return self._mask("class", name, lambda: blank)

    def _ends_year(self, rows: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Where the digits so far, over tokens that follow each other without a space, make a year."""
        n_digits, values = self._digits
        own_length, own = n_digits[rows], values[rows]
        goes_on = (own_length > 0) & ~self._is_spaced[rows]
        length, number = own_length, own
        for _ in range(_MAX_DIGITS - 1):
            length = own_length + torch.where(goes_on, _shifted(length), 0)
            number = own + torch.where(goes_on, _shifted(number), 0) * 10**own_length
        return (own_length > 0) & (length == 4) & (number >= YEARS[0]) & (number < YEARS[1])

    @cached_property
    def affixes(self) -> tuple[Affixes, ...]:
        """All beginnings and ends of up to `MAX_AFFIX` letters that tokens of that length or more have."""
        found = []
        for length in range(1, MAX_AFFIX + 1):
            for how, cut in (("begins", slice(length)), ("ends", slice(-length, None))):
                codes: dict[str, int] = {}
                ids = [
                    codes.setdefault(text[cut], len(codes)) if len(text) >= length else -1
                    for text in self.stripped
                ]
                found.append(Affixes(how, tuple(codes), torch.tensor(ids)))  # type: ignore[arg-type]
        return tuple(found)

    # -- what these need of every token -----------------------------------------------------

    @cached_property
    def _digits(self) -> tuple[Int[Tensor, "token"], Int[Tensor, "token"]]:
        """How many digits a token is made of (0 for other tokens), and their value."""
        is_number = self.of_class("number").tolist()
        digits = [t if own else "" for t, own in zip(self.stripped, is_number, strict=True)]
        lengths = torch.tensor([min(len(own), _MAX_DIGITS) for own in digits])
        values = [int(own) if 0 < len(own) < _MAX_DIGITS else 0 for own in digits]
        return lengths, torch.tensor(values)

    @cached_property
    def _is_spaced(self) -> Bool[Tensor, "token"]:
        return torch.tensor([text[:1].isspace() for text in self.texts])

    @cached_property
    def _begins_with_letter(self) -> Bool[Tensor, "token"]:
        return torch.tensor([text[:1].isalpha() for text in self.stripped])

    @cached_property
    def _ends_in_letter(self) -> Bool[Tensor, "token"]:
        return torch.tensor([text[-1:].isalpha() for text in self.stripped])

    @cached_property
    def ends_clause(self) -> Bool[Tensor, "token"]:
        """Punctuation, line breaks and BOS: what a clause begins behind."""
        bos = self.listed([self.bos_id])
        return self.of_class("punctuation") | self._blank("newline") | bos

    def _mask(self, kind: str, name: str, made: Callable[[], list[bool]]) -> Bool[Tensor, "token"]:
        return self._cached(kind, name, lambda: torch.tensor(made(), dtype=torch.bool))

    def _cached(self, kind: str, name: str, made: Callable[[], Tensor]) -> Bool[Tensor, "token"]:
        if (kind, name) not in self._masks:
            self._masks[kind, name] = made()
        return self._masks[kind, name]


def _shifted(values: Tensor) -> Tensor:
    """What stands one position before; 0 before the first."""
    return pad(values, (1, 0))[:, :-1]
