"""What the answers of a blind study give away: an attack on every number in its ledger, by nearest match.

An attacker who has the weights takes a number that was given about a position, computes for every token of the
vocabulary what the number would be if that token stood there, and names the nearest. He tries all that he knows
how to compute: the de-embedding (with and without position, extended, through the head that is named), what the
model makes of the token by itself, and each of these over the norm's scale, which he is told.

A feature says something about its tokens before anything is asked. So chance is not one in d_vocab: it is how often
he hits with the same numbers dealt out anew among the positions at which the same was asked of the same feature.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.blind.ledger import Entry, example_order, key_of
from tclib.circuits.frozen import by_layer
from tclib.dictionaries.dictionary import Dictionary
from tclib.features import from_weights as weights
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.statistics import to_numpy

N_DEALT = 1_000
MAX_NUMBERS = 1_000  # of one kind
LISTED = "sources: which features of layer 0 are active"
HEADS = "sources: which heads raise it most, and from where"
ALLOWED = {  # by the paper's rules, whatever it tells
    "examples, activation": "activations may be seen",
    "activation, activation": "activations may be seen",
    HEADS: "circuits may be seen",
    LISTED: "full studies may read the de-embeddings of active features",
}
WAYS = tuple(
    f"{way}{scaled}"
    for way in ("direct", "placed", "normed", "extended", "MLP 0", "lone")
    for scaled in ("", " / scale")
)
NUMBERS = ("activation", "weight", "contribution", "share")
_NODE = re.compile(r"(?:attn(?P<layer>\d+)\[(?P<head>\d+)\]|.*)@(?P<pos>\d+)$")


class _Place(NamedTuple):
    """What a number is about: a feature's value at a token, through a head, and the token that is sought."""

    layer: int
    feature: int
    head: weights.Head | None
    row: int
    pos: int  # of the token that is sought
    reader: int  # of the feature


class _Given(NamedTuple):
    what: str
    place: _Place
    number: float


def leakage(
    lm: LanguageModel,
    transcoders: Mapping[str, Dictionary],
    studies: Sequence[Sequence[Entry]],
    rows: Int[Tensor, "row pos"],
) -> pd.DataFrame:
    """The attack on the blind part of ledgers: given, n, hits, chance, p, bits, rule.

    `rows` are the corpus. A line for every field of every question, with the
    attacker's best way of computing it: how often the nearest token is the one that stands there, how often by
    chance, the chance of as many hits with the best of all ways (over `N_DEALT` deals), and by how many bits the number narrows the vocabulary down, beyond what the feature says by itself.
    """
    attacker = _Attacker(lm, transcoders, rows)
    by_what: dict[str, list[_Given]] = defaultdict(list)
    for study in studies:
        order = example_order(key_of(study), len(rows)).tolist()
        for given in _numbers(study, order):
            by_what[given.what].append(given)
    lines = [_best_attack(attacker, what, _some(given)) for what, given in by_what.items()]
    for name, listed in ((LISTED, _low_lines), (HEADS, _head_lines)):
        found = [_listing_ranks(attacker, study, listed) for study in studies]
        if ranks := [block for block in found if len(block)]:
            lines.append({"given": name, **_against_chance({"listed": ranks})})
    table = pd.DataFrame(lines, columns=["given", "n", "hits", "chance", "p", "bits"])
    return table.assign(rule=table["given"].map(ALLOWED).fillna(""))


def _some(given: list[_Given]) -> list[_Given]:
    """At most `MAX_NUMBERS` of them, drawn in the same way every time."""
    if len(given) <= MAX_NUMBERS:
        return given
    drawn = np.random.default_rng(0).choice(len(given), MAX_NUMBERS, replace=False)
    return [given[i] for i in sorted(drawn)]


# ---------------------------------------------------------------------------------------------
# What was given


def _numbers(study: Sequence[Entry], order: Sequence[int]) -> Iterator[_Given]:
    """Every number of the blind answers that hangs on the input, and what follows from several."""
    own = study[0].arguments
    blind = [entry for entry in study if entry.kind == "question" and entry.is_blind]
    wholes = {
        _asked_of(entry): float(entry.answer) for entry in blind if entry.question == "activation"
    }
    for entry in blind:
        asked = {"layer": own["layer"], "feature": own["feature"], **entry.arguments}
        lines = list(_lines(entry))
        for line, what in lines:
            yield from _numbers_of(line, what, asked, order)
        whole = wholes.get(_asked_of(entry))
        if entry.question == "sources" and whole:
            for line, what in _derived([line for line, _ in lines], whole, asked):
                yield from _numbers_of(line, what, asked, order)


def _asked_of(entry: Entry) -> tuple[Any, ...]:
    return tuple(entry.arguments.get(name) for name in ("layer", "feature", "example", "pos"))


def _derived(
    lines: Sequence[dict[str, Any]], whole: float, asked: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], str]]:
    """What is left of the whole without the lines that are given, and each line's part of it."""
    given = [(line, line["contribution"]) for line in lines if _is_number(line.get("contribution"))]
    if not given:  # what is left is the whole, which counts as such
        return
    left = whole - sum(number for _, number in given)
    rest = {"kind": "rest", "pos": asked["pos"], "contribution": left}
    yield rest, "the whole less all that is listed"
    for line, number in given:
        ratio: dict[str, Any] = {n: line[n] for n in ("layer", "head", "pos") if n in line}
        yield {**ratio, "contribution": number / whole}, "ratio to the whole"


def _lines(entry: Entry) -> Iterator[tuple[dict[str, Any], str]]:
    """An answer as lines that say what they are about."""
    name, answer, asked = entry.question, entry.answer, entry.arguments
    if name == "activation":
        yield {"pos": asked["pos"], "activation": answer}, name
    elif name == "examples":
        for line in answer:
            yield line, name
    elif name == "sources":
        for line in answer:
            yield line, f"sources: {line['kind']}{' of layer 0' * (line['layer'] == 0)}"
    elif name == "paths":
        for line in answer:
            yield _end_of(line), name


def _end_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """A path as a line about its end, through its last head."""
    ends = [_NODE.fullmatch(node) for node in line["path"].split(" <- ")]
    heads = [end.groupdict() for end in ends if end and end["head"]]
    found: dict[str, Any] = {**line, "pos": int(ends[-1]["pos"]) if ends[-1] else -1}
    if heads:
        found |= {"layer": int(heads[-1]["layer"]), "head": int(heads[-1]["head"])}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _numbers_of(
    line: dict[str, Any], what: str, asked: Mapping[str, Any], order: Sequence[int]
) -> Iterator[_Given]:
    head = None
    if line.get("head", -1) >= 0:
        head = weights.Head(int(line["layer"]), int(line["head"]))
    row = order[int(line.get("example", asked.get("example", -1)))]
    pos = int(line["pos"]) if line["pos"] >= 0 else int(asked["pos"])
    reader = int(asked.get("pos", pos))
    place = _Place(int(asked["layer"]), int(asked["feature"]), head, row, pos, reader)
    for name in NUMBERS:
        if _is_number(line.get(name)) and pos > 0:
            yield _Given(f"{what}, {name}", place, float(line[name]))


# ---------------------------------------------------------------------------------------------
# The attacker


class _Attacker:
    def __init__(
        self,
        lm: LanguageModel,
        transcoders: Mapping[str, Dictionary],
        rows: Int[Tensor, "row pos"],
    ) -> None:
        self.lm, self.rows = lm, rows
        self.by_layer = by_layer(lm, transcoders.values())
        self.lone = weights.LoneTokens(lm, transcoders.values())
        self._scales: dict[int, Float[Tensor, "layer pos"]] = {}
        self._read: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}
        self._sizes: dict[int, np.ndarray] = {}

    def candidates(self, place: _Place) -> dict[str, Float[np.ndarray, "d_vocab"]]:
        """What the number would be for every token, in each way that can be computed."""
        found = dict(self.of_feature(place))
        direct, offset, size = found["direct"], 0.0, self._size(place.pos)
        if self.lm.W_pos is not None:
            offset = float(self.lm.W_pos[place.pos] @ self._direction)
        found |= {"placed": direct + offset, "normed": (direct + offset) / size}
        scale = self._scale(place)
        return found | {f"{name} / scale": scores / scale for name, scores in found.items()}

    def of_feature(self, place: _Place) -> dict[str, np.ndarray]:
        """What hangs on the feature and the head alone."""
        if place[:3] not in self._read:
            dictionary = self.by_layer[place.layer]
            read = weights.reading_direction(self.lm, dictionary, place.feature, place.head)
            self._direction = read
            found = {"direct": self.lm.W_E @ read}
            if place.layer > 0:
                found["extended"] = self.lm.extended_embedding @ read
                found["MLP 0"] = found["extended"] - found["direct"]
            if place.head is None:
                found["lone"] = self.lone.scores(dictionary, place.feature)
            self._read = {place[:3]: {way: to_numpy(s).astype(float) for way, s in found.items()}}
        return self._read[place[:3]]

    def _size(self, pos: int) -> Float[np.ndarray, "d_vocab"]:
        """The root mean square of every token's embedding at a position."""
        if pos not in self._sizes:
            placed = self.lm.W_E if self.lm.W_pos is None else self.lm.W_E + self.lm.W_pos[pos]
            self._sizes[pos] = to_numpy(placed.square().mean(1).sqrt())
        return self._sizes[pos]

    @torch.no_grad()
    def _scale(self, place: _Place) -> float:
        """σ in front of the feature, which the attacker is told."""
        if place.row not in self._scales:
            sites = [Site("mlp_in", layer) for layer in range(self.lm.n_layers)]
            row = self.rows[[place.row]].long()
            scales = self.lm.read_with_scale(row, set(sites))[1]
            self._scales[place.row] = torch.stack([scales[site][0] for site in sites])
        return float(self._scales[place.row][place.layer, place.reader])

    def truth(self, place: _Place) -> int:
        """The token that is sought."""
        return int(self.rows[place.row, place.pos])


def _best_attack(attacker: _Attacker, what: str, given: Sequence[_Given]) -> dict[str, Any]:
    """The way of computing that hits most; p is of the best of all ways."""
    by_way: dict[str, list[np.ndarray]] = defaultdict(list)
    groups: dict[tuple[Any, ...], list[_Given]] = defaultdict(list)
    for one in given:
        groups[one.place[:3]].append(one)
    for group in groups.values():
        ranks = _ranks(attacker, group)
        for (
            way
        ) in WAYS:  # a way that does not exist for this feature: no token is nearer than another
            blank = np.full((len(group), len(group)), (attacker.lm.d_vocab - 1) / 2)
            by_way[way].append(ranks.get(way, blank))
    return {"given": what, **_against_chance(by_way)}


def _against_chance(by_way: Mapping[str, Sequence[Float[np.ndarray, "_ _"]]]) -> dict[str, Any]:
    """n, hits, chance and p of the way that hits most, and the bits of the way that narrows down most."""
    n = sum(map(len, next(iter(by_way.values()))))
    hits = {way: _dealt(blocks, _hit) for way, blocks in by_way.items()}
    above = {way: found.true - found.dealt.mean() for way, found in hits.items()}
    best = max(above, key=lambda way: above[way])
    best_dealt = np.max([found.dealt - found.dealt.mean() for found in hits.values()], axis=0)
    bits = [_dealt(blocks, _bits) for blocks in by_way.values()]
    narrowed = max(found.true - found.dealt.mean() for found in bits)
    by_chance = np.max([found.dealt - found.dealt.mean() for found in bits], axis=0).mean()
    return {
        "n": n,
        "hits": hits[best].true,
        "chance": float(hits[best].dealt.mean()),
        "p": (1 + int((best_dealt >= above[best] - 1e-9).sum())) / (1 + N_DEALT),
        "bits": float(narrowed - by_chance) / n,
    }


_Line = Mapping[str, Any]


def _listing_ranks(
    attacker: _Attacker,
    study: Sequence[Entry],
    listed: Callable[[_Attacker, _Line, Entry], tuple[int, np.ndarray] | None],
) -> Float[np.ndarray, "n n"]:
    """At [i, j] the rank of the token at place j by all that is listed about place i.

    Every line that a study was given about a place speaks for the tokens that its feature or head reads.
    """
    order = example_order(key_of(study), len(attacker.rows)).tolist()
    places: dict[tuple[int, int], np.ndarray] = {}
    for entry in study:
        if entry.question != "sources" or not entry.is_blind:
            continue
        for found in (listed(attacker, line, entry) for line in entry.answer):
            if found is not None:
                place = (order[entry.arguments["example"]], found[0])
                places[place] = places.get(place, 0.0) + found[1]
    if not places:
        return np.zeros((0, 0))
    table = np.stack(list(places.values()))  # [place, d_vocab]
    of_tokens = table[:, [int(attacker.rows[place]) for place in places]]
    return np.asarray((table[:, None] > of_tokens[:, :, None]).sum(-1), dtype=float)


def _low_lines(
    attacker: _Attacker, line: _Line, entry: Entry
) -> tuple[int, Float[np.ndarray, "d_vocab"]] | None:
    """What a listed feature of layer 0 says of the token at the position."""
    if line["kind"] != "feature" or line["layer"] != 0:
        return None
    read = weights.de_embedding(attacker.lm, attacker.by_layer[0], int(line["feature"]))
    return int(entry.arguments["pos"]), _in_deviations(read)


def _head_lines(
    attacker: _Attacker, line: _Line, entry: Entry
) -> tuple[int, Float[np.ndarray, "d_vocab"]] | None:
    """What a listed head says of the token that it reads."""
    if line["kind"] != "head":
        return None
    asked = entry.arguments
    head = weights.Head(int(line["layer"]), int(line["head"]))
    place = _Place(int(asked["layer"]), int(asked["feature"]), head, 0, int(line["pos"]), 0)
    found = attacker.of_feature(place)
    return int(line["pos"]), _in_deviations(found["direct" if head.layer == 0 else "extended"])


def _in_deviations(scores: Any) -> Float[np.ndarray, "d_vocab"]:
    values = to_numpy(scores) if isinstance(scores, Tensor) else scores
    return np.asarray((values - values.mean()) / values.std(), dtype=float)


def _ranks(attacker: _Attacker, group: Sequence[_Given]) -> dict[str, Float[np.ndarray, "n n"]]:
    """By way: at [i, j] the rank of the token at place j by nearness to number i; 0 is nearest."""
    numbers = np.array([one.number for one in group])
    at: dict[_Place, dict[str, np.ndarray]] = {}
    for place in dict.fromkeys(one.place for one in group):
        token = attacker.truth(place)
        candidates = attacker.candidates(place).items()
        at[place] = {way: _nearness(scores, numbers, token) for way, scores in candidates}
    ways = at[group[0].place]
    return {way: np.stack([at[one.place][way] for one in group], axis=1) for way in ways}


def _nearness(
    scores: Float[np.ndarray, "d_vocab"], numbers: Float[np.ndarray, "n"], token: int
) -> Float[np.ndarray, "n"]:
    """How many tokens are nearer to each number than `token`; of equally near ones half."""
    ordered = np.sort(scores)
    distance = np.abs(scores[token] - numbers)

    def within(reach: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        left = np.searchsorted(ordered, numbers - reach, side="right")
        right = np.searchsorted(ordered, numbers + reach, side="left")
        return np.asarray(right - left, dtype=float)

    slack = 1e-5 * np.abs(numbers) + 1e-12  # numbers are written with five digits
    nearer, as_near = within(distance - slack).clip(min=0), within(distance + slack)
    return np.asarray(nearer + (as_near - nearer - 1).clip(min=0) / 2)


def _hit(ranks: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """1 where the token is nearest; of several that are as near, its part."""
    return np.asarray((ranks < 1) / (1 + 2 * ranks))


def _bits(ranks: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    return np.asarray(-np.log2(1 + ranks))


class _Dealt(NamedTuple):
    """A sum over numbers where they belong, and over the same numbers dealt out anew."""

    true: float
    dealt: Float[np.ndarray, "deal"]


def _dealt(
    blocks: Sequence[Float[np.ndarray, "_ _"]], score: Callable[[np.ndarray], np.ndarray]
) -> _Dealt:
    """Dealt out within each block, in the same way whatever the score."""
    generator = np.random.default_rng(0)
    true, dealt = 0.0, np.zeros(N_DEALT)
    for block in map(score, blocks):
        own = np.arange(len(block))
        orders = generator.permuted(np.tile(own, (N_DEALT, 1)), axis=1)
        true += float(np.trace(block))
        dealt += block[orders, own].sum(1)
    return _Dealt(true, dealt)
