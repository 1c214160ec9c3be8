"""One number of every released set, on a few paragraphs: whether its files are read as they were meant.

A transcoder that is read at another site, in another basis or with a matrix on its side explains none of an MLP's
output (FVU at or above 1) or fires everywhere. The rules, written before any set was read:

    features active a token    within a factor of two of what was released, where it was said
    FVU                        below 0.7
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tclib.dictionaries.bases import to_processed
from tclib.dictionaries.published import load_published
from tclib.dictionaries.released_sets import released_set
from tclib.evaluation.metrics import fvu, l0
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked

MAX_FVU = 0.7
L0_FACTOR = 2.0
TEXT = (
    "The ferry left the harbour a little after seven, with forty passengers, two lorries and a crate of "
    "oranges that nobody had claimed. By the time the fog lifted, the captain had already changed course "
    "twice, and the children on the upper deck were counting gulls instead of islands.",
    "To add two fractions, first bring them to a common denominator. If one half and one third are to be "
    "added, write them as three sixths and two sixths; together they make five sixths. The same rule holds "
    "for any number of fractions, provided that none of the denominators is zero.",
    "In 1874 the town council voted to build a second bridge across the river. The engineers asked for three "
    "years and received two; the bridge opened in the autumn of 1876, and for most of the next century it "
    "carried every train between the northern mines and the sea.",
)


class ReleasedCheck(NamedTuple):
    """What was found of a set's middle layer, beside what was released."""

    name: str
    layer: int
    released_l0: int | None
    l0: float
    fvu: float
    verdict: str


@checked
@torch.no_grad()
def check_released(name: str, lm: LanguageModel | None = None) -> ReleasedCheck:
    """Load a set's middle layer and its model, and compare (rules above).

    `lm` stands for the model of that name. Errors: `InputError` for files that are not there, or do not fit the model.
    """
    one = released_set(name)
    layer = one.middle
    found = load_published(name, [layer], lazy=True)[layer]
    lm = LanguageModel.load(one.model) if lm is None else lm
    dictionary = to_processed(found, lm)
    dictionary.check_model(lm)
    sites = (dictionary.config.input_site, dictionary.config.output_site)
    acts = [lm.read(lm.tokenize(text), sites) for text in TEXT]
    read, written = (torch.cat([one[site][0, 1:] for one in acts]).float().cpu() for site in sites)
    found_at = dictionary.to(dtype=torch.float32)(read)
    active, unexplained = l0(found_at.feature_acts), fvu(written, found_at.reconstruction)
    return ReleasedCheck(
        *(name, layer, one.l0_of(layer), active, unexplained),
        _verdict(one.l0_of(layer), active, unexplained),
    )


def _verdict(released: int | None, active: float, unexplained: float) -> str:
    if not unexplained < MAX_FVU:
        return f"not as released: FVU at or above {MAX_FVU:g}"
    if released is not None and not released / L0_FACTOR <= active <= released * L0_FACTOR:
        return f"not as released: L0 not within a factor of {L0_FACTOR:g}"
    return "as released"
