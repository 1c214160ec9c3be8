"""The bundled world: English-like documents whose every token has a known latent label.

A document is written by a grammar of twenty kinds (`KINDS`). Every random choice goes through a
`Writer`, which adds up its surprisal, so that the cost in nats of the whole derivation is known
exactly. Because a derivation determines its text, the mean derivation surprisal per token is an
upper bound on the entropy of the language (`surprisal_bound`), and no model can be expected to beat
the entropy itself: a loss close to the bound means that the language has been learned.

Two small language models trained on this world are bundled under data/demo: `gpt2` (sequential
blocks, learned positions) and `neox` (parallel blocks, rotary positions). `train_model` made them.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from tclib.support.progress import progress
from tclib.support.runs import InputError
from tclib.text.packing import pack

T = TypeVar("T")

BOS = "<|bos|>"
UNKNOWN = "<|unk|>"
PIECE_PATTERN = r" ?\d\d| ?[A-Za-z]+| ?[^A-Za-z0-9\s]"
_PIECE = re.compile(PIECE_PATTERN)
VOCABULARY_SEED = 20_240_617
VOCABULARY_DOCUMENTS = 60_000

# ---------------------------------------------------------------------------------------------
# Words

FIRST_NAMES = [
    "Alice",
    "Amir",
    "Anna",
    "Boris",
    "Carla",
    "Chen",
    "Clara",
    "Daniel",
    "David",
    "Diego",
    "Elena",
    "Emma",
    "Felix",
    "Fiona",
    "George",
    "Grace",
    "Hana",
    "Henry",
    "Igor",
    "Irene",
    "Jack",
    "Jane",
    "John",
    "Julia",
    "Karim",
    "Kate",
    "Laura",
    "Leo",
    "Linda",
    "Lucas",
    "Maria",
    "Mark",
    "Mary",
    "Mina",
    "Nina",
    "Noah",
    "Olga",
    "Oscar",
    "Paul",
    "Peter",
    "Rita",
    "Robert",
    "Rosa",
    "Ruth",
    "Sam",
    "Sara",
    "Simon",
    "Sofia",
    "Thomas",
    "Vera",
    "Victor",
    "Walter",
    "Yara",
    "Zoe",
]
SURNAMES = [
    "Adams",
    "Baker",
    "Becker",
    "Brown",
    "Burnett",
    "Carter",
    "Castro",
    "Clark",
    "Cole",
    "Dixon",
    "Evans",
    "Fischer",
    "Ford",
    "Garcia",
    "Gomez",
    "Gray",
    "Hale",
    "Harris",
    "Hawkins",
    "Hill",
    "Holt",
    "Hughes",
    "Jensen",
    "Jones",
    "Kaplan",
    "Keller",
    "Kim",
    "King",
    "Klein",
    "Lane",
    "Larsen",
    "Lee",
    "Lewis",
    "Lopez",
    "Marsh",
    "Mason",
    "Meyer",
    "Miller",
    "Moore",
    "Nolan",
    "Novak",
    "Olsen",
    "Owens",
    "Park",
    "Patel",
    "Price",
    "Reed",
    "Rossi",
    "Russo",
    "Schmidt",
    "Shaw",
    "Silva",
    "Singh",
    "Smith",
    "Stone",
    "Tanaka",
    "Turner",
    "Wagner",
    "Walsh",
    "Weber",
    "West",
    "Wolf",
    "Wood",
    "Wright",
    "Young",
]
EVENTS = [
    "war",
    "siege",
    "reign",
    "drought",
    "famine",
    "strike",
    "trial",
    "voyage",
    "expedition",
    "campaign",
    "rebellion",
    "alliance",
    "blockade",
    "dispute",
    "feud",
    "project",
    "occupation",
    "revolt",
    "truce",
    "dynasty",
    "festival",
    "migration",
    "plague",
    "conflict",
    "exile",
    "partnership",
]
OBJECTS = [
    "book",
    "lamp",
    "chair",
    "table",
    "coat",
    "ring",
    "letter",
    "clock",
    "knife",
    "basket",
    "hat",
    "mirror",
    "ladder",
    "drum",
    "violin",
    "map",
    "bottle",
    "candle",
    "painting",
    "carpet",
    "key",
    "purse",
    "hammer",
    "kettle",
    "pillow",
    "rope",
    "saddle",
    "shovel",
    "stamp",
    "sword",
    "telescope",
    "ticket",
    "umbrella",
    "vase",
    "wallet",
    "whistle",
]
FOODS = [
    "apples",
    "pears",
    "plums",
    "figs",
    "onions",
    "carrots",
    "beans",
    "peas",
    "lemons",
    "olives",
    "grapes",
    "dates",
    "nuts",
    "cherries",
    "potatoes",
    "tomatoes",
    "mushrooms",
    "peppers",
    "melons",
    "peaches",
]
ANIMALS = [
    "dog",
    "cat",
    "horse",
    "cow",
    "goat",
    "fox",
    "wolf",
    "bear",
    "lion",
    "tiger",
    "rabbit",
    "duck",
    "crow",
    "owl",
    "eagle",
    "snake",
    "frog",
    "monkey",
    "camel",
    "donkey",
]
PLACES = [
    "London",
    "Paris",
    "Rome",
    "Berlin",
    "Madrid",
    "Vienna",
    "Prague",
    "Cairo",
    "Delhi",
    "Tokyo",
    "Lima",
    "Oslo",
    "Dublin",
    "Athens",
    "Geneva",
    "Lisbon",
    "Boston",
    "Chicago",
    "Havana",
    "Moscow",
    "Warsaw",
    "Milan",
    "Naples",
    "Turin",
]
SPOTS = [
    "river",
    "bridge",
    "market",
    "harbour",
    "station",
    "forest",
    "church",
    "castle",
    "garden",
    "school",
    "museum",
    "library",
    "mill",
    "farm",
    "tower",
    "gate",
    "well",
    "park",
    "square",
    "shop",
]
PEOPLE = [
    "farmer",
    "guard",
    "king",
    "queen",
    "doctor",
    "teacher",
    "sailor",
    "soldier",
    "merchant",
    "painter",
    "baker",
    "hunter",
    "thief",
    "fisherman",
    "judge",
    "lawyer",
    "nurse",
    "pilot",
    "priest",
    "tailor",
    "boy",
    "girl",
    "driver",
    "cook",
]
CATCHING_VERBS = ["trapped", "captured", "seized", "grabbed", "snatched"]
NEWSPAPERS = ["Times", "Herald", "Post", "Tribune", "Guardian", "Journal", "Courier", "Gazette"]
TEAMS = [
    "Lions",
    "Bears",
    "Hawks",
    "Giants",
    "Rovers",
    "Tigers",
    "Eagles",
    "Kings",
    "Sharks",
    "Wolves",
    "Pirates",
    "Rangers",
]
ADJECTIVES = [
    "old",
    "young",
    "tall",
    "small",
    "heavy",
    "bright",
    "quiet",
    "strong",
    "cheap",
    "strange",
    "broken",
    "golden",
    "wooden",
    "famous",
    "gentle",
    "hungry",
    "lazy",
    "brave",
    "clever",
    "tired",
]
WEATHER = ["rain", "wind", "snow", "fog", "storm", "heat", "frost", "hail"]
WEATHER_STATES = ["cold", "heavy", "bitter", "fierce", "endless", "harsh"]
SCIENCES = {
    "biology": "biologist",
    "physics": "physicist",
    "chemistry": "chemist",
    "geology": "geologist",
    "botany": "botanist",
    "zoology": "zoologist",
    "astronomy": "astronomer",
    "economics": "economist",
    "mathematics": "mathematician",
    "psychology": "psychologist",
}
TOPICS = [
    "memory",
    "sleep",
    "attention",
    "language",
    "pain",
    "growth",
    "stress",
    "vision",
    "hearing",
    "learning",
    "inflation",
    "erosion",
    "migration",
    "fatigue",
    "hunger",
]
CODE_WORDS = [
    "alpha",
    "bravo",
    "delta",
    "echo",
    "foxtrot",
    "hotel",
    "india",
    "juliet",
    "kilo",
    "lima",
    "oscar",
    "papa",
    "quebec",
    "romeo",
    "sierra",
    "tango",
    "victor",
    "whiskey",
    "yankee",
    "zulu",
]
LEGAL_VERBS = ["provide", "offer", "supply", "sell", "disclose", "transfer", "publish", "lease"]
LEGAL_OBJECTS = [
    "services",
    "goods",
    "documents",
    "records",
    "licences",
    "funds",
    "equipment",
    "software",
]
LEGAL_PARTIES = ["company", "agent", "seller", "buyer", "tenant", "bank", "contractor", "owner"]
COSTLY = [
    "bridge",
    "road",
    "tunnel",
    "dam",
    "harbour",
    "stadium",
    "palace",
    "canal",
    "tower",
    "airport",
]
COST_KINDS = ["cost", "value", "budget", "loss", "profit", "price"]
COOKING = ["chop", "boil", "fry", "peel", "wash", "slice", "bake", "mash"]
ALL_VERBS = ["sleep", "eat", "run", "drink", "rest", "hide", "wander", "play"]
OPINIONS = (
    "the plan would fail",
    "the road was unsafe",
    "the vote was fair",
    "nobody had asked him",
    "the money was gone",
    "the work would go on",
    "the team had done well",
    "the law must change",
    "prices would rise again",
    "the school would close",
)
SPOKEN = (
    "I will not go",
    "the ship is late",
    "we must leave now",
    "you are welcome here",
    "it is too dark",
    "nobody knows the way",
    "I have seen it before",
    "the door is open",
)


# ---------------------------------------------------------------------------------------------
# The writer


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
    w.say(f" {w.choose(EVENTS)}", "event")
    w.say(f" {w.choose(('lasted', 'ran', 'continued'))} from{article}")
    _year(w, century, first, "first")
    w.say(f" to{article}")
    w.say(f" {century}", "second_century")
    w.say(_two_digits(w.between(first + 1, 99)), "second_yy")
    w.say(".", "stop")


def lifespan(w: Writer) -> None:
    """Anna Smith was born in 1735 in Rome and died in 1790."""
    century, first = w.between(11, 19), w.between(0, 98)
    w.say(f" {w.choose(FIRST_NAMES)}", "first_name")
    w.say(f" {w.choose(SURNAMES)}", "surname")
    w.say(" was born in")
    _year(w, century, first, "birth")
    w.say(" in")
    w.say(f" {w.choose(PLACES)}", "place")
    w.say(" and died in")
    w.say(f" {century}", "death_century")
    w.say(_two_digits(w.between(first + 1, 99)), "death_yy")
    w.say(".", "stop")


def citation(w: Writer) -> None:
    """Sleep has been studied in Rome (Smith, 1976; Jones and Lee, 1981)."""
    w.say(f" {w.choose(TOPICS).capitalize()}", "topic")
    w.say(f" has been studied {w.choose(('in detail', 'for years', 'in animals', 'at length'))}")
    w.say(" (", "open")
    n_works = 1 + w.between(0, 3)
    for work in range(n_works):
        w.say(f"{'' if work == 0 else ' '}{w.choose(SURNAMES)}", "author")
        if w.chance(0.3):
            w.say(" and", "and")
            w.say(f" {w.choose(SURNAMES)}", "coauthor")
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
    w.say(f" The {w.choose(PEOPLE)}")
    w.say(w.choose((" was", " had been", " was soon")), "auxiliary")
    if w.chance(0.5):
        w.say(" caught", "caught")
    else:
        w.say(f" {w.choose(CATCHING_VERBS)}", "synonym")
    w.say(f" by the {w.choose(PEOPLE)} near the {w.choose(SPOTS)}")
    w.say(".", "stop")


def caught_active(w: Writer) -> None:
    """The boy quickly caught the duck: the active past tense and its synonyms."""
    w.say(f" The {w.choose(PEOPLE)}")
    if w.chance(0.4):
        w.say(f" {w.choose(('quickly', 'finally', 'almost'))}", "adverb")
    if w.chance(0.5):
        w.say(" caught", "caught")
    else:
        w.say(f" {w.choose(CATCHING_VERBS)}", "synonym")
    w.say(f" the {w.choose(ANIMALS)} at the {w.choose(SPOTS)}")
    w.say(".", "stop")


def gift(w: Writer) -> None:
    """John and Mary went to the market. John gave the ring to Mary. Mary thanked John."""
    pair = w.distinct(FIRST_NAMES, 2)
    w.say(f" {pair[0]}", "first_mention")
    w.say(" and")
    w.say(f" {pair[1]}", "second_mention")
    w.say(f" went to the {w.choose(SPOTS)}.")
    giver, receiver = pair if w.chance(0.5) else pair[::-1]
    w.say(f" {giver}", "giver")
    w.say(f" gave the {w.choose(OBJECTS)} to")
    w.say(f" {receiver}", "receiver")
    w.say(".", "stop")
    w.say(f" {receiver}", "thanker")
    w.say(" thanked")
    w.say(f" {giver}", "thanked")
    w.say(".", "stop")


def food_list(w: Writer) -> None:
    """The basket held apples, pears, plums and figs."""
    items = w.distinct(FOODS, w.between(3, 6))
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
    things = w.distinct(OBJECTS, 2)
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
    concession = f" the {w.choose(WEATHER)} was {w.choose(WEATHER_STATES)}"
    main = f" the {w.choose(PEOPLE)} {w.choose(('went out', 'stayed', 'waited', 'kept working'))}"
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
    paper = w.choose(NEWSPAPERS)
    w.say(f" {paper}", "newspaper")
    w.say(",")
    w.say(f" {w.choose(SURNAMES)}", "speaker")
    if told:
        w.say(" told", "told")
        w.say(f" the {paper} that")
    else:
        w.say(" said", "said")
        w.say(" that")
    w.say(f" {w.choose(OPINIONS)}", "opinion")
    w.say(".", "stop")


def quotation(w: Writer) -> None:
    """ "The ship is late," said the king: what opens with a quotation mark closes with one."""
    spoken = w.choose(SPOKEN)
    w.say(' "', "open_quote")
    w.say(spoken[0].upper() + spoken[1:], "speech")
    w.say(",", "comma")
    w.say('"', "close_quote")
    w.say(f" {w.choose(('said', 'cried', 'whispered', 'answered'))}", "verb")
    w.say(f" the {w.choose(PEOPLE)}")
    w.say(".", "stop")


def score(w: Writer) -> None:
    """The Lions beat the Bears 42 to 17: the winner's number is the larger."""
    teams = w.distinct(TEAMS, 2)
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
    foods = w.distinct(FOODS, 2)
    w.say(" First", "first")
    w.say(f", {w.choose(COOKING)} the")
    w.say(f" {foods[0]}", "ingredient")
    w.say(".", "stop")
    w.say(" Then", "then")
    w.say(f" {w.choose(COOKING)} the")
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
    parties = w.distinct(LEGAL_PARTIES, 2)
    negated = w.chance(0.6)
    w.say(f" The {parties[0]} shall")
    if negated:
        w.say(" not", "not")
    w.say(f" {w.choose(LEGAL_VERBS)}", "verb_negated" if negated else "verb")
    w.say(f" {'any' if negated else 'all'}", "quantifier")
    w.say(f" {w.choose(LEGAL_OBJECTS)} to the {parties[1]}")
    w.say(".", "stop")


def science(w: Writer) -> None:
    """Clara studied biology in Vienna and became a biologist."""
    subject = w.choose(tuple(SCIENCES))
    profession = SCIENCES[subject]
    w.say(f" {w.choose(FIRST_NAMES)} studied")
    w.say(f" {subject}", "subject")
    w.say(f" in {w.choose(PLACES)} and became {'an' if profession[0] in 'aeiou' else 'a'}")
    w.say(f" {profession}", "profession")
    w.say(".", "stop")


def estimate(w: Writer) -> None:
    """The bridge was built with a total estimated cost of 45 million dollars."""
    w.say(f" The {w.choose(COSTLY)} was {w.choose(('built', 'sold', 'closed', 'repaired'))}")
    w.say(" with a total")
    w.say(" estimated", "estimated")
    w.say(f" {w.choose(COST_KINDS)}", "quantity")
    w.say(" of")
    w.say(f" {w.between(10, 99)}", "amount")
    w.say(f" {w.choose(('thousand', 'million'))} dollars")
    w.say(".", "stop")


def quantified(w: Writer) -> None:
    """All wolves hide at night, but some goats play."""
    animals = w.distinct(PLURALS, 2)
    first = w.choose(("All", "Some", "Most"))
    w.say(f" {first}", first.lower())
    w.say(f" {animals[0]} {w.choose(ALL_VERBS)} at night")
    w.say(", but")
    second = w.choose(("all", "some", "most"))
    w.say(f" {second}", f"second_{second}")
    w.say(f" {animals[1]} {w.choose(ALL_VERBS)}")
    w.say(".", "stop")


def agreement(w: Writer) -> None:
    """The dogs near the old tower are tired: the verb agrees with the first noun."""
    plural = w.chance(0.5)
    noun = w.choose(PLURALS if plural else ANIMALS)
    w.say(" The")
    w.say(f" {noun}", "plural_subject" if plural else "singular_subject")
    w.say(f" near the {w.choose(ADJECTIVES)}")
    w.say(f" {w.choose(ANIMALS) if w.chance(0.5) else w.choose(PLURALS)}", "attractor")
    w.say(" are" if plural else " is", "plural_verb" if plural else "singular_verb")
    w.say(f" {w.choose(ADJECTIVES)}")
    w.say(".", "stop")


def code_repeat(w: Writer) -> None:
    """The code is alpha tango lima. Again: alpha tango lima."""
    words = [w.choose(CODE_WORDS) for _ in range(w.between(3, 6))]
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
    names = w.distinct(FIRST_NAMES, 2)
    w.say(f" {names[0]}", "addressee")
    w.say(f", thank you for the {w.choose(ADJECTIVES)} {w.choose(OBJECTS)}.")
    w.say(" Yours", "yours")
    w.say(",")
    w.say(f" {names[1]}", "sender")
    w.say(".", "stop")


_IRREGULAR_PLURALS = {"wolf": "wolves", "fox": "foxes"}
PLURALS = [_IRREGULAR_PLURALS.get(animal, animal + "s") for animal in ANIMALS]

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


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of documents; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield write_document(rng)


def held_out_pairs(n_ctx: int) -> list[tuple[Document, Document]]:
    """What the models are measured on: pairs of held-out documents that fit the context together."""
    drawn = list(itertools.islice(documents(HELD_OUT_SEED), HELD_OUT_DOCUMENTS))
    pairs = zip(drawn[::2], drawn[1::2], strict=True)
    return [(a, b) for a, b in pairs if len(a.tokens) + len(b.tokens) + 3 <= n_ctx]


def surprisal_bound(measured: Sequence[Document]) -> float:
    """Mean derivation surprisal in nats per predicted token: an upper bound on the entropy rate.

    H(text) = H(derivation) − H(derivation | text) ≤ H(derivation). Each document predicts its own
    tokens and the BOS that ends it, so the sum is divided by tokens + documents.
    """
    nats = sum(sum(document.surprisals) for document in measured)
    return nats / sum(len(document.tokens) + 1 for document in measured)


# ---------------------------------------------------------------------------------------------
# Tokens


def vocabulary() -> dict[str, int]:
    """Token to id: BOS, unknown, the hundred two-digit tokens without and with a space, the words."""
    stream = documents(VOCABULARY_SEED)
    pieces = {p for _ in range(VOCABULARY_DOCUMENTS) for p in next(stream).tokens}
    numbers = [f"{space}{n:02d}" for space in ("", " ") for n in range(100)]
    words = sorted(pieces.difference(numbers))
    return {token: i for i, token in enumerate([BOS, UNKNOWN, *numbers, *words])}


def build_tokenizer() -> Any:
    """The world's word-level tokenizer, as a transformers fast tokenizer.

    A space is put before the text, so that "The war" and " The war" are the same tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE_PATTERN), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------------------------
# The bundled models


@dataclass(frozen=True)
class ModelTraining:
    """How a bundled model is trained (defaults: exactly how the committed ones were)."""

    architecture: str = "gpt2"  # "gpt2" or "neox"
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_ctx: int = 128
    n_steps: int = 2400
    rows_per_step: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    seed: int = 1


HELD_OUT_SEED = 987_654_321
HELD_OUT_DOCUMENTS = 2_000


def _new_model(config: ModelTraining, d_vocab: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    if config.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=d_vocab,
                n_positions=config.n_ctx,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **special,
            )
        )
    if config.architecture == "neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=d_vocab,
                hidden_size=config.d_model,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                intermediate_size=4 * config.d_model,
                max_position_embeddings=config.n_ctx,
                **special,
            )
        )
    raise InputError(f"architecture {config.architecture!r}: expected 'gpt2' or 'neox'")


def _token_rows(seed: int, n_rows: int, n_ctx: int, ids: dict[str, int]) -> torch.Tensor:
    encoded = ([ids[token] for token in document.tokens] for document in documents(seed))
    return torch.from_numpy(pack(encoded, n_ctx, ids[BOS], n_rows)).long()


def _next_token_loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _learning_rate_share(step: int, config: ModelTraining) -> float:
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return warmup * 0.5 * (1.0 + math.cos(math.pi * step / config.n_steps))


def train_model(config: ModelTraining, folder: Path) -> dict[str, float]:
    """Train one bundled model and write it, its tokenizer and its card to `folder`.

    The weights are stored as float16; the losses in the card are those of the rounded weights.
    """
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    model = _new_model(config, len(ids))
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: _learning_rate_share(s, config)
    )
    rows = _token_rows(config.seed, config.n_steps * config.rows_per_step, config.n_ctx, ids)
    bar = progress(rows.split(config.rows_per_step), f"demo {config.architecture}")
    for batch in bar:
        loss = _next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = held_out_pairs(config.n_ctx)
    card = {
        "held_out_loss_nats": held_out_loss(model.float(), pairs, ids),
        "derivation_bound_nats": surprisal_bound([second for _, second in pairs]),
        "n_training_tokens": config.n_steps * config.rows_per_step * config.n_ctx,
    }
    text = json.dumps({"training": asdict(config), **card}, indent=2)
    (folder / "card.json").write_text(text + "\n")
    return card


@torch.no_grad()
def held_out_loss(
    model: Any, pairs: Sequence[tuple[Document, Document]], ids: dict[str, int]
) -> float:
    """Mean loss in nats a predicted token over the second document of each pair.

    The first document only stands in front: in packed rows a model sees the BOS at position 0 mostly
    before the middle of a document, so a document's beginning is learned behind another BOS.
    Directly comparable with `surprisal_bound` of the second documents.
    """
    nats, n_predicted = 0.0, 0
    for start in range(0, len(pairs), 100):
        batch = pairs[start : start + 100]
        rows = [[BOS, *a.tokens, BOS, *b.tokens, BOS] for a, b in batch]
        width = max(map(len, rows))
        tokens = torch.tensor([[ids[t] for t in row + [BOS] * (width - len(row))] for row in rows])
        losses = torch.nn.functional.cross_entropy(
            model(tokens, use_cache=False).logits[:, :-1].transpose(1, 2),
            tokens[:, 1:],
            reduction="none",
        )
        first = torch.tensor([len(a.tokens) + 1 for a, _ in batch])[:, None]
        last = torch.tensor([len(row) - 1 for row in rows])[:, None]
        position = torch.arange(width - 1)[None]
        counted = (position >= first) & (position < last)
        nats += float(losses[counted].double().sum())
        n_predicted += int(counted.sum())
    return nats / n_predicted
