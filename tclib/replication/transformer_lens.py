"""Notebook 03's section on TransformerLens: one transcoder in its hooks, and in `replace_mlp`."""

from __future__ import annotations

import torch

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.replace import replace_mlp
from tclib.models.interop import boot
from tclib.models.locate import locate
from tclib.replication.run import Run
from tclib.support.errors import InputError


@torch.no_grad()
def logits_apart(run: Run, dictionary: Dictionary) -> float:
    """How far TransformerLens's logits with a dictionary in its hooks are from ours, over the largest.

    On the run's prompt, up to a constant a token, which no probability sees. Errors: `InputError` for a model that
    TransformerLens cannot boot.
    """
    lm, tokens = run.lm, run.prompt[0].cache.tokens[:1]
    bridge = boot(locate(run.preset.model), lm.device)
    theirs = bridge.run_with_hooks(tokens, fwd_hooks=dictionary.hooks(), prepend_bos=False)
    with replace_mlp(lm, dictionary):
        ours = lm.logits(tokens)
    apart = theirs - ours
    apart -= apart.mean(-1, keepdim=True)
    return float(apart.abs().max() / ours.abs().max())


def in_words(run: Run, dictionary: Dictionary) -> str:
    """What came of it."""
    try:
        apart = logits_apart(run, dictionary)
    except InputError as error:
        return f"Not compared: {error}."
    return (
        f"With the transcoder of layer {dictionary.config.layer} in place, its logits differ from ours by {apart:.0e} "
        "of the largest."
    )
