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
_STRETCH = re.compile(r"\[(.*?)\]\((\w+)\)|([^\[]+)")
_DRAWN = re.compile(r"<(.*?)>")
_WORD_FILE = Path(__file__).with_name("world_words.json")
WORDS = SimpleNamespace(**json.loads(_WORD_FILE.read_text(encoding="utf-8")))
_IRREGULAR_PLURALS = {"wolf": "wolves", "fox": "foxes"}
WORDS.plurals = [_IRREGULAR_PLURALS.get(animal, animal + "s") for animal in WORDS.animals]


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

    def fill(self, template: str) -> str:
        """The template with each `<list>` of WORDS, and each `<one|other>`, replaced by a choice."""
        return _DRAWN.sub(lambda drawn: self.choose(_options(drawn[1])), template)

    def say(self, template: str) -> None:
        """Append the tokens of a template, in which `[text](role)` names what its text plays.

        The choices of a stretch of one role are drawn before its first token.
        """
        for labelled, role, plain in _STRETCH.findall(template):
            pieces = _PIECE.findall(self.fill(labelled or plain))
            self.tokens += pieces
            self.labels += [f"{self.kind}.{role or 'text'}"] * len(pieces)
            self.surprisals += [self._pending_nats, *[0.0] * (len(pieces) - 1)]
            self._pending_nats = 0.0


def _options(drawn: str) -> Sequence[str]:
    options: Sequence[str] = drawn.split("|") if "|" in drawn else getattr(WORDS, drawn)
    return options


# ---------------------------------------------------------------------------------------------
# The kinds: each writes one paragraph


def year_range(w: Writer) -> None:
    """The siege lasted from the year 1735 to the year 1762: the second year is always later."""
    century, first = w.between(11, 19), w.between(0, 98)
    article = " the year" if w.chance(0.75) else ""
    w.say(f" The[ <events>](event) <lasted|ran|continued> from{article}")
    w.say(f"[ {century}](first_century)[{first:02d}](first_yy) to{article}")
    w.say(f"[ {century}](second_century)")
    w.say(f"[{w.between(first + 1, 99):02d}](second_yy)[.](stop)")


def lifespan(w: Writer) -> None:
    """Anna Smith was born in 1735 in Rome and died in 1790."""
    century, first = w.between(11, 19), w.between(0, 98)
    w.say("[ <first_names>](first_name)[ <surnames>](surname) was born in")
    w.say(f"[ {century}](birth_century)[{first:02d}](birth_yy) in[ <places>](place)")
    w.say(f" and died in[ {century}](death_century)")
    w.say(f"[{w.between(first + 1, 99):02d}](death_yy)[.](stop)")


def citation(w: Writer) -> None:
    """Sleep has been studied in Rome (Smith, 1976; Jones and Lee, 1981)."""
    topic = w.choose(WORDS.topics).capitalize()
    w.say(
        f"[ {topic}](topic) has been studied <in detail|for years|in animals|at length>[ (](open)"
    )
    n_works = 1 + w.between(0, 3)
    for work in range(n_works):
        w.say("[<surnames>](author)" if work == 0 else "[ <surnames>](author)")
        if w.chance(0.3):
            w.say("[ and](and)[ <surnames>](coauthor)")
        w.say("[,](comma)")
        century = w.weighted({19: 3, 20: 1})
        w.say(f"[ {century}](century)")
        w.say(f"[{w.between(0, 99 if century == 19 else 25):02d}](yy)")
        if work < n_works - 1:
            w.say("[;](semicolon)")
    w.say("[)](close)[.](stop)")


def caught_passive(w: Writer) -> None:
    """The thief was caught by the guard near the river: the participle and its synonyms."""
    w.say(" The <people>[ <was|had been|was soon>](auxiliary)")
    w.say("[ caught](caught)" if w.chance(0.5) else "[ <catching_verbs>](synonym)")
    w.say(" by the <people> near the <spots>[.](stop)")


def caught_active(w: Writer) -> None:
    """The boy quickly caught the duck: the active past tense and its synonyms."""
    w.say(" The <people>")
    if w.chance(0.4):
        w.say("[ <quickly|finally|almost>](adverb)")
    w.say("[ caught](caught)" if w.chance(0.5) else "[ <catching_verbs>](synonym)")
    w.say(" the <animals> at the <spots>[.](stop)")


def gift(w: Writer) -> None:
    """John and Mary went to the market. John gave the ring to Mary. Mary thanked John."""
    pair = w.distinct(WORDS.first_names, 2)
    w.say(f"[ {pair[0]}](first_mention) and[ {pair[1]}](second_mention) went to the <spots>.")
    giver, receiver = pair if w.chance(0.5) else pair[::-1]
    w.say(f"[ {giver}](giver) gave the <objects> to[ {receiver}](receiver)[.](stop)")
    w.say(f"[ {receiver}](thanker) thanked[ {giver}](thanked)[.](stop)")


def food_list(w: Writer) -> None:
    """The basket held apples, pears, plums and figs."""
    *items, last = w.distinct(WORDS.foods, w.between(3, 6))
    w.say(" The <basket|box|cart|kitchen> held")
    w.say("[,](comma)".join(f"[ {item}](item)" for item in items))
    w.say(f"[ and](and)[ {last}](item)[.](stop)")


def price(w: Writer) -> None:
    """The lamp costs 35 dollars and the coat costs 60 dollars, so the lamp is cheaper."""
    things = w.distinct(WORDS.objects, 2)
    costs = w.distinct(range(10, 100), 2)
    compared = "cheaper" if costs[0] < costs[1] else "dearer"
    w.say(f" The {things[0]} costs[ {costs[0]}](first_price) dollars")
    w.say(f" and the {things[1]} costs[ {costs[1]}](second_price) dollars,")
    w.say(f" so the {things[0]} is[ {compared}](comparison)[.](stop)")


def although_clause(w: Writer) -> None:
    """Although the rain was cold, the farmer went out; or the clause comes second."""
    opens = w.chance(0.6)
    word = w.choose(("although", "though"))
    concession = w.fill(" the <weather> was <weather_states>")
    main = w.fill(" <people> <went out|stayed|waited|kept working>")
    if opens:
        w.say(f"[ {word.capitalize()}](opening){concession}[,](clause_comma) the{main}")
    else:
        w.say(f" The{main}[,](comma)[ {word}](second){concession}")
    w.say("[.](stop)")


def interview(w: Writer) -> None:
    """In an interview with the Herald, Smith said that the plan would fail."""
    told = w.chance(0.4)
    w.say(" In an[ interview](interview) with the")
    paper = w.choose(WORDS.newspapers)
    w.say(f"[ {paper}](newspaper),[ <surnames>](speaker)")
    w.say(f"[ told](told) the {paper} that" if told else "[ said](said) that")
    w.say("[ <opinions>](opinion)[.](stop)")


def quotation(w: Writer) -> None:
    """ "The ship is late," said the king: what opens with a quotation mark closes with one."""
    spoken = w.choose(WORDS.spoken)
    w.say(f'[ "](open_quote)[{spoken[0].upper()}{spoken[1:]}](speech)[,](comma)["](close_quote)')
    w.say("[ <said|cried|whispered|answered>](verb) the <people>[.](stop)")


def score(w: Writer) -> None:
    """The Lions beat the Bears 42 to 17: the winner's number is the larger."""
    teams = w.distinct(WORDS.teams, 2)
    won = w.chance(0.5)
    first = w.between(11, 98) if won else w.between(10, 97)
    second = w.between(10, first - 1) if won else w.between(first + 1, 98)
    w.say(f" The {teams[0]}[ {'beat' if won else 'lost to'}](verb) the {teams[1]}")
    w.say(f"[ {first}](first_score) to[ {second}](second_score)[.](stop)")


def recipe(w: Writer) -> None:
    """First, chop the onions. Then boil the carrots. Finally, serve the onions with the carrots."""
    one, other = w.distinct(WORDS.foods, 2)
    w.say(f"[ First](first), <cooking> the[ {one}](ingredient)[.](stop)")
    w.say(f"[ Then](then) <cooking> the[ {other}](ingredient)[.](stop)")
    w.say(f"[ Finally](finally), serve the[ {one}](recalled) with the[ {other}](recalled)[.](stop)")


def legal(w: Writer) -> None:
    """The company shall not provide services to the tenant."""
    parties = w.distinct(WORDS.legal_parties, 2)
    negated = w.chance(0.6)
    verb, quantifier = ("verb_negated", "any") if negated else ("verb", "all")
    w.say(f" The {parties[0]} shall")
    if negated:
        w.say("[ not](not)")
    w.say(f"[ <legal_verbs>]({verb})[ {quantifier}](quantifier)")
    w.say(f" <legal_objects> to the {parties[1]}[.](stop)")


def science(w: Writer) -> None:
    """Clara studied biology in Vienna and became a biologist."""
    subject = w.choose(tuple(WORDS.sciences))
    profession = WORDS.sciences[subject]
    article = "an" if profession[0] in "aeiou" else "a"
    w.say(f" <first_names> studied[ {subject}](subject)")
    w.say(f" in <places> and became {article}[ {profession}](profession)[.](stop)")


def estimate(w: Writer) -> None:
    """The bridge was built with a total estimated cost of 45 million dollars."""
    w.say(" The <costly> was <built|sold|closed|repaired> with a total[ estimated](estimated)")
    w.say("[ <cost_kinds>](quantity) of")
    w.say(f"[ {w.between(10, 99)}](amount) <thousand|million> dollars[.](stop)")


def quantified(w: Writer) -> None:
    """All wolves hide at night, but some goats play."""
    animals = w.distinct(WORDS.plurals, 2)
    first = w.choose(("All", "Some", "Most"))
    w.say(f"[ {first}]({first.lower()}) {animals[0]} <all_verbs> at night, but")
    second = w.choose(("all", "some", "most"))
    w.say(f"[ {second}](second_{second}) {animals[1]} <all_verbs>[.](stop)")


def agreement(w: Writer) -> None:
    """The dogs near the old tower are tired: the verb agrees with the first noun."""
    plural = w.chance(0.5)
    number, verb = ("plural", "are") if plural else ("singular", "is")
    noun = w.choose(WORDS.plurals if plural else WORDS.animals)
    w.say(f" The[ {noun}]({number}_subject) near the <adjectives>")
    w.say("[ <animals>](attractor)" if w.chance(0.5) else "[ <plurals>](attractor)")
    w.say(f"[ {verb}]({number}_verb) <adjectives>[.](stop)")


def code_repeat(w: Writer) -> None:
    """The code is alpha tango lima. Again: alpha tango lima."""
    words = [w.choose(WORDS.code_words) for _ in range(w.between(3, 6))]
    w.say(" The code is" + "".join(f"[ {word}](code)" for word in words) + "[.](stop)")
    w.say(" Again[:](colon)" + "".join(f"[ {word}](repeat)" for word in words) + "[.](stop)")


def letter(w: Writer) -> None:
    """Dear Rosa, thank you for the old clock. Yours, Felix."""
    w.say(" Dear")
    names = w.distinct(WORDS.first_names, 2)
    w.say(f"[ {names[0]}](addressee), thank you for the <adjectives> <objects>.")
    w.say(f"[ Yours](yours),[ {names[1]}](sender)[.](stop)")


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
