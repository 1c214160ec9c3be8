"""The grammar of the bundled world: twenty kinds of document, every token labelled, every choice priced.

Every random choice goes through a `Writer`, which adds up its surprisal, so that the cost in nats of a whole
derivation is known exactly. The words lie in world_words.json.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

T = TypeVar("T")

PIECE_PATTERN = r" ?\d\d| ?[A-Za-z]+| ?[^A-Za-z0-9\s]"
_PIECE = re.compile(PIECE_PATTERN)
_WORD_FILE = Path(__file__).with_name("world_words.json")
WORDS = SimpleNamespace(**json.loads(_WORD_FILE.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Document:
    """One document: its tokens, the latent label of each (`kind.role`) and each one's surprisal.

    `surprisals[i]` is the cost in nats of the choices made since token i - 1; their sum is
    −log p(derivation) exactly, while the division among tokens depends on when a choice was drawn.
    """

    kind: str
    tokens: tuple[str, ...]
    labels: tuple[str, ...]
    surprisals: tuple[float, ...]

    @property
    def text(self) -> str:
        return "".join(self.tokens)


@dataclass
class Writer:
    """Draws the choices of one document and keeps what they cost."""

    rng: random.Random
    kind: str = ""
    tokens: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    surprisals: list[float] = field(default_factory=list)
    _pending_nats: float = 0.0

    def choose(self, options: Sequence[T]) -> T:
        """One of `options`, uniformly."""
        self._pending_nats += math.log(len(options))
        return options[int(self.rng.random() * len(options))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        happened = self.rng.random() < probability
        self._pending_nats -= math.log(probability if happened else 1.0 - probability)
        return happened

    def weighted(self, weights: dict[T, float]) -> T:
        """A key of `weights`, with probability in proportion to its value."""
        total = sum(weights.values())
        point = self.rng.random() * total
        for chosen in weights:
            point -= weights[chosen]
            if point < 0:
                break
        self._pending_nats -= math.log(weights[chosen] / total)
        return chosen

    def distinct(self, options: Sequence[T], n: int) -> list[T]:
        """`n` different options in random order."""
        left = list(options)
        drawn = []
        for _ in range(n):
            drawn.append(self.choose(left))
            left.remove(drawn[-1])
        return drawn

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included, uniformly."""
        return self.choose(range(low, high + 1))

    def say(self, text: str, role: str = "text") -> None:
        """Append the tokens of `text`, all of which play the given role."""
        for piece in _PIECE.findall(text):
            self.tokens.append(piece)
            self.labels.append(f"{self.kind}.{role}")
            self.surprisals.append(self._pending_nats)
            self._pending_nats = 0.0


def _two_digits(number: int) -> str:
    return f"{number:02d}"


def _year(w: Writer, century: int, year: int, role: str, space: str = " ") -> None:
    w.say(f"{space}{century}", f"{role}_century")
    w.say(_two_digits(year), f"{role}_yy")


# ---------------------------------------------------------------------------------------------
# The kinds: each writes one paragraph


def year_range(w: Writer) -> None:
    """The siege lasted from the year 1735 to the year 1762: the second year is always later."""
    century, first = w.between(11, 19), w.between(0, 98)
    article = " the year" if w.chance(0.75) else ""
    w.say(" The")
    w.say(f" {w.choose(WORDS.events)}", "event")
    w.say(f" {w.choose(('lasted', 'ran', 'continued'))} from{article}")
    _year(w, century, first, "first")
    w.say(f" to{article}")
    w.say(f" {century}", "second_century")
    w.say(_two_digits(w.between(first + 1, 99)), "second_yy")
    w.say(".", "stop")


def lifespan(w: Writer) -> None:
    """Anna Smith was born in 1735 in Rome and died in 1790."""
    century, first = w.between(11, 19), w.between(0, 98)
    w.say(f" {w.choose(WORDS.first_names)}", "first_name")
    w.say(f" {w.choose(WORDS.surnames)}", "surname")
    w.say(" was born in")
    _year(w, century, first, "birth")
    w.say(" in")
    w.say(f" {w.choose(WORDS.places)}", "place")
    w.say(" and died in")
    w.say(f" {century}", "death_century")
    w.say(_two_digits(w.between(first + 1, 99)), "death_yy")
    w.say(".", "stop")


def citation(w: Writer) -> None:
    """Sleep has been studied in Rome (Smith, 1976; Jones and Lee, 1981)."""
    w.say(f" {w.choose(WORDS.topics).capitalize()}", "topic")
    w.say(f" has been studied {w.choose(('in detail', 'for years', 'in animals', 'at length'))}")
    w.say(" (", "open")
    n_works = 1 + w.between(0, 3)
    for work in range(n_works):
        w.say(f"{'' if work == 0 else ' '}{w.choose(WORDS.surnames)}", "author")
        if w.chance(0.3):
            w.say(" and", "and")
            w.say(f" {w.choose(WORDS.surnames)}", "coauthor")
        w.say(",", "comma")
        century = w.weighted({19: 3, 20: 1})
        w.say(f" {century}", "century")
        w.say(_two_digits(w.between(0, 99 if century == 19 else 25)), "yy")
        if work < n_works - 1:
            w.say(";", "semicolon")
    w.say(")", "close")
    w.say(".", "stop")


def caught_passive(w: Writer) -> None:
    """The thief was caught by the guard near the river: the participle and its synonyms."""
    w.say(f" The {w.choose(WORDS.people)}")
    w.say(w.choose((" was", " had been", " was soon")), "auxiliary")
    if w.chance(0.5):
        w.say(" caught", "caught")
    else:
        w.say(f" {w.choose(WORDS.catching_verbs)}", "synonym")
    w.say(f" by the {w.choose(WORDS.people)} near the {w.choose(WORDS.spots)}")
    w.say(".", "stop")


def caught_active(w: Writer) -> None:
    """The boy quickly caught the duck: the active past tense and its synonyms."""
    w.say(f" The {w.choose(WORDS.people)}")
    if w.chance(0.4):
        w.say(f" {w.choose(('quickly', 'finally', 'almost'))}", "adverb")
    if w.chance(0.5):
        w.say(" caught", "caught")
    else:
        w.say(f" {w.choose(WORDS.catching_verbs)}", "synonym")
    w.say(f" the {w.choose(WORDS.animals)} at the {w.choose(WORDS.spots)}")
    w.say(".", "stop")


def gift(w: Writer) -> None:
    """John and Mary went to the market. John gave the ring to Mary. Mary thanked John."""
    pair = w.distinct(WORDS.first_names, 2)
    w.say(f" {pair[0]}", "first_mention")
    w.say(" and")
    w.say(f" {pair[1]}", "second_mention")
    w.say(f" went to the {w.choose(WORDS.spots)}.")
    giver, receiver = pair if w.chance(0.5) else pair[::-1]
    w.say(f" {giver}", "giver")
    w.say(f" gave the {w.choose(WORDS.objects)} to")
    w.say(f" {receiver}", "receiver")
    w.say(".", "stop")
    w.say(f" {receiver}", "thanker")
    w.say(" thanked")
    w.say(f" {giver}", "thanked")
    w.say(".", "stop")


def food_list(w: Writer) -> None:
    """The basket held apples, pears, plums and figs."""
    items = w.distinct(WORDS.foods, w.between(3, 6))
    w.say(f" The {w.choose(('basket', 'box', 'cart', 'kitchen'))} held")
    for position, item in enumerate(items):
        w.say(f" {item}", "item")
        if position < len(items) - 2:
            w.say(",", "comma")
        elif position == len(items) - 2:
            w.say(" and", "and")
    w.say(".", "stop")


def price(w: Writer) -> None:
    """The lamp costs 35 dollars and the coat costs 60 dollars, so the lamp is cheaper."""
    things = w.distinct(WORDS.objects, 2)
    costs = w.distinct(range(10, 100), 2)
    w.say(f" The {things[0]} costs")
    w.say(f" {costs[0]}", "first_price")
    w.say(f" dollars and the {things[1]} costs")
    w.say(f" {costs[1]}", "second_price")
    w.say(f" dollars, so the {things[0]} is")
    w.say(" cheaper" if costs[0] < costs[1] else " dearer", "comparison")
    w.say(".", "stop")


def although_clause(w: Writer) -> None:
    """Although the rain was cold, the farmer went out; or the clause comes second."""
    opens = w.chance(0.6)
    word = w.choose(("although", "though"))
    concession = f" the {w.choose(WORDS.weather)} was {w.choose(WORDS.weather_states)}"
    main = f" the {w.choose(WORDS.people)} {w.choose(('went out', 'stayed', 'waited', 'kept working'))}"
    if opens:
        w.say(f" {word.capitalize()}", "opening")
        w.say(concession)
        w.say(",", "clause_comma")
        w.say(main)
    else:
        w.say(f" The{main.removeprefix(' the')}")
        w.say(",", "comma")
        w.say(f" {word}", "second")
        w.say(concession)
    w.say(".", "stop")


def interview(w: Writer) -> None:
    """In an interview with the Herald, Smith said that the plan would fail."""
    told = w.chance(0.4)
    w.say(" In an")
    w.say(" interview", "interview")
    w.say(" with the")
    paper = w.choose(WORDS.newspapers)
    w.say(f" {paper}", "newspaper")
    w.say(",")
    w.say(f" {w.choose(WORDS.surnames)}", "speaker")
    if told:
        w.say(" told", "told")
        w.say(f" the {paper} that")
    else:
        w.say(" said", "said")
        w.say(" that")
    w.say(f" {w.choose(WORDS.opinions)}", "opinion")
    w.say(".", "stop")


def quotation(w: Writer) -> None:
    """ "The ship is late," said the king: what opens with a quotation mark closes with one."""
    spoken = w.choose(WORDS.spoken)
    w.say(' "', "open_quote")
    w.say(spoken[0].upper() + spoken[1:], "speech")
    w.say(",", "comma")
    w.say('"', "close_quote")
    w.say(f" {w.choose(('said', 'cried', 'whispered', 'answered'))}", "verb")
    w.say(f" the {w.choose(WORDS.people)}")
    w.say(".", "stop")


def score(w: Writer) -> None:
    """The Lions beat the Bears 42 to 17: the winner's number is the larger."""
    teams = w.distinct(WORDS.teams, 2)
    won = w.chance(0.5)
    first = w.between(11, 98) if won else w.between(10, 97)
    second = w.between(10, first - 1) if won else w.between(first + 1, 98)
    w.say(f" The {teams[0]}")
    w.say(f" {'beat' if won else 'lost to'}", "verb")
    w.say(f" the {teams[1]}")
    w.say(f" {first}", "first_score")
    w.say(" to")
    w.say(f" {second}", "second_score")
    w.say(".", "stop")


def recipe(w: Writer) -> None:
    """First, chop the onions. Then boil the carrots. Finally, serve the onions with the carrots."""
    foods = w.distinct(WORDS.foods, 2)
    w.say(" First", "first")
    w.say(f", {w.choose(WORDS.cooking)} the")
    w.say(f" {foods[0]}", "ingredient")
    w.say(".", "stop")
    w.say(" Then", "then")
    w.say(f" {w.choose(WORDS.cooking)} the")
    w.say(f" {foods[1]}", "ingredient")
    w.say(".", "stop")
    w.say(" Finally", "finally")
    w.say(", serve the")
    w.say(f" {foods[0]}", "recalled")
    w.say(" with the")
    w.say(f" {foods[1]}", "recalled")
    w.say(".", "stop")


def legal(w: Writer) -> None:
    """The company shall not provide services to the tenant."""
    parties = w.distinct(WORDS.legal_parties, 2)
    negated = w.chance(0.6)
    w.say(f" The {parties[0]} shall")
    if negated:
        w.say(" not", "not")
    w.say(f" {w.choose(WORDS.legal_verbs)}", "verb_negated" if negated else "verb")
    w.say(f" {'any' if negated else 'all'}", "quantifier")
    w.say(f" {w.choose(WORDS.legal_objects)} to the {parties[1]}")
    w.say(".", "stop")


def science(w: Writer) -> None:
    """Clara studied biology in Vienna and became a biologist."""
    subject = w.choose(tuple(WORDS.sciences))
    profession = WORDS.sciences[subject]
    w.say(f" {w.choose(WORDS.first_names)} studied")
    w.say(f" {subject}", "subject")
    w.say(f" in {w.choose(WORDS.places)} and became {'an' if profession[0] in 'aeiou' else 'a'}")
    w.say(f" {profession}", "profession")
    w.say(".", "stop")


def estimate(w: Writer) -> None:
    """The bridge was built with a total estimated cost of 45 million dollars."""
    w.say(f" The {w.choose(WORDS.costly)} was {w.choose(('built', 'sold', 'closed', 'repaired'))}")
    w.say(" with a total")
    w.say(" estimated", "estimated")
    w.say(f" {w.choose(WORDS.cost_kinds)}", "quantity")
    w.say(" of")
    w.say(f" {w.between(10, 99)}", "amount")
    w.say(f" {w.choose(('thousand', 'million'))} dollars")
    w.say(".", "stop")


def quantified(w: Writer) -> None:
    """All wolves hide at night, but some goats play."""
    animals = w.distinct(PLURALS, 2)
    first = w.choose(("All", "Some", "Most"))
    w.say(f" {first}", first.lower())
    w.say(f" {animals[0]} {w.choose(WORDS.all_verbs)} at night")
    w.say(", but")
    second = w.choose(("all", "some", "most"))
    w.say(f" {second}", f"second_{second}")
    w.say(f" {animals[1]} {w.choose(WORDS.all_verbs)}")
    w.say(".", "stop")


def agreement(w: Writer) -> None:
    """The dogs near the old tower are tired: the verb agrees with the first noun."""
    plural = w.chance(0.5)
    noun = w.choose(PLURALS if plural else WORDS.animals)
    w.say(" The")
    w.say(f" {noun}", "plural_subject" if plural else "singular_subject")
    w.say(f" near the {w.choose(WORDS.adjectives)}")
    w.say(f" {w.choose(WORDS.animals) if w.chance(0.5) else w.choose(PLURALS)}", "attractor")
    w.say(" are" if plural else " is", "plural_verb" if plural else "singular_verb")
    w.say(f" {w.choose(WORDS.adjectives)}")
    w.say(".", "stop")


def code_repeat(w: Writer) -> None:
    """The code is alpha tango lima. Again: alpha tango lima."""
    words = [w.choose(WORDS.code_words) for _ in range(w.between(3, 6))]
    w.say(" The code is")
    for word in words:
        w.say(f" {word}", "code")
    w.say(".", "stop")
    w.say(" Again")
    w.say(":", "colon")
    for word in words:
        w.say(f" {word}", "repeat")
    w.say(".", "stop")


def letter(w: Writer) -> None:
    """Dear Rosa, thank you for the old clock. Yours, Felix."""
    w.say(" Dear")
    names = w.distinct(WORDS.first_names, 2)
    w.say(f" {names[0]}", "addressee")
    w.say(f", thank you for the {w.choose(WORDS.adjectives)} {w.choose(WORDS.objects)}.")
    w.say(" Yours", "yours")
    w.say(",")
    w.say(f" {names[1]}", "sender")
    w.say(".", "stop")


_IRREGULAR_PLURALS = {"wolf": "wolves", "fox": "foxes"}
PLURALS = [_IRREGULAR_PLURALS.get(animal, animal + "s") for animal in WORDS.animals]

KINDS: dict[Callable[[Writer], None], float] = {
    year_range: 4.0,
    lifespan: 1.5,
    citation: 2.0,
    caught_passive: 1.0,
    caught_active: 1.0,
    gift: 1.5,
    food_list: 1.0,
    price: 1.0,
    although_clause: 1.0,
    interview: 1.0,
    quotation: 1.0,
    score: 1.0,
    recipe: 1.0,
    legal: 1.0,
    science: 1.0,
    estimate: 1.0,
    quantified: 1.0,
    agreement: 1.0,
    code_repeat: 1.0,
    letter: 1.0,
}
PARAGRAPH_WEIGHTS = {1: 5.0, 2: 3.0, 3: 2.0}


def write_document(rng: random.Random) -> Document:
    """One document: a kind by its weight, then one to three paragraphs of that kind."""
    w = Writer(rng)
    kind = w.weighted(KINDS)
    w.kind = kind.__name__
    for _ in range(w.weighted(PARAGRAPH_WEIGHTS)):
        kind(w)
    return Document(w.kind, tuple(w.tokens), tuple(w.labels), tuple(w.surprisals))
