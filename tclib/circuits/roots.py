"""What an attribution graph explains: targets with weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.support.errors import InputError


class Roots(NamedTuple):
    """What a graph explains, and how much each counts."""

    targets: list[Target]
    weights: list[float]
    token_ids: list[int]  # −1 where a root is not one logit


def top_logits(
    frozen: FrozenPrompts,
    prompt: int = 0,
    pos: int = -1,
    max_logits: int = 10,
    probability: float = 0.95,
) -> Roots:
    """The most likely next tokens: as few as reach `probability`, at most `max_logits`.

    Their weights are their probabilities. Errors: `InputError` for a share outside (0, 1].
    """
    if not 0 < probability <= 1 or max_logits < 1:
        raise InputError(
            f"probability {probability}, max_logits {max_logits}: expected a share in (0, 1] and at least 1"
        )
    best = frozen.cache.logits[prompt, pos].softmax(-1).topk(min(max_logits, frozen.lm.d_vocab))
    enough = int((best.values.cumsum(0) < probability).sum()) + 1
    ids, shares = best.indices[:enough].tolist(), best.values[:enough].tolist()
    names = frozen.lm.token_strings(ids)
    targets = [
        frozen.logit_target({i: 1.0}, pos, prompt, name=f"logit {name!r}")
        for i, name in zip(ids, names, strict=True)
    ]
    return Roots(targets, shares, ids)


def equal_roots(roots: Sequence[Target]) -> Roots:
    """The targets as roots of one weight."""
    n_roots = len(roots)
    return Roots(list(roots), [1 / max(1, n_roots)] * n_roots, [-1] * n_roots)


def check_roots(roots: Sequence[Target], prompt: int) -> None:
    """Raise `InputError` for no roots, roots of another prompt, or roots that read attention."""
    if not roots:
        raise InputError("no roots: give at least one target, or None for the most likely logits")
    strangers = [root.name for root in roots if root.prompt != prompt]
    if strangers:
        raise InputError(
            f"roots {strangers} are of another prompt than {prompt}: one graph explains one prompt"
        )
    inner = [root.name for root in roots if root.site.part == "attention"]
    if inner:
        raise InputError(f"roots {inner} read attention: expected features or logits")
