"""The paper's released GPT-2 transcoders: loading them, and checking activations that its notebooks print.

They lie on the hub as `pchlenski/gpt2-transcoders`, one .pt a layer; a local folder with the same files does as
well. Activations at a prompt are taken in the model as it is, or with the MLPs of lower layers replaced by their
transcoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats import read_authors
from tclib.evaluation.replace import replace_mlp
from tclib.models.language_model import LanguageModel
from tclib.models.locate import check_hub_reachable
from tclib.support.runs import InputError, paper_table

REPOSITORY_ID = "pchlenski/gpt2-transcoders"
FILE_NAME = "final_sparse_autoencoder_gpt2-small_blocks.{layer}.ln2.hook_normalized_24576.pt"
TOLERANCE = 0.005


def load_published(
    layers: Iterable[int] = range(12), folder: Path | None = None
) -> dict[int, Dictionary]:
    """The released transcoders by layer, from a folder, or else from the hub or its cache.

    Errors: `InputError` naming the file that is missing and how to get it; nothing is half loaded.
    """
    paths = locate_published("hub" if folder is None else str(folder), layers)
    found = {}
    for layer, path in paths.items():
        one = read_authors(path)
        if one.config.layer != layer:
            raise InputError(f"{path} holds layer {one.config.layer}, its name says {layer}")
        found[layer] = one
    return found


def locate_published(source: str, layers: Iterable[int] = range(12)) -> dict[int, Path]:
    """The files of the released transcoders by layer; `source` is "hub" (or its cache) or a folder.

    Errors: `InputError` naming the file that is missing and how to get it, or the unreachable hub.
    """
    found = {}
    for layer in layers:
        name = FILE_NAME.format(layer=layer)
        path = _from_hub(name) if source == "hub" else Path(source).expanduser() / name
        if not path.is_file():
            raise InputError(
                f"{path} is missing: download {name} of {REPOSITORY_ID} into {path.parent}"
            )
        found[layer] = path
    return found


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(REPOSITORY_ID, name)
    if isinstance(cached, str):
        return Path(cached)
    check_hub_reachable(f"the released transcoders lie at {REPOSITORY_ID} on the hub")
    return Path(hf_hub_download(REPOSITORY_ID, name))


@torch.no_grad()
def prompt_activation(
    lm: LanguageModel,
    transcoders: Mapping[int, Dictionary],
    layer: int,
    feature: int,
    prompt: str,
    at_token: str,
    prepend_bos: bool = True,
    replaced: Iterable[int] = (),
) -> float:
    """A feature's activation at the last occurrence of a token, with some MLPs replaced.

    Errors: `InputError` for a token that does not occur, or a layer without a transcoder.
    """
    missing = sorted({layer, *replaced} - set(transcoders))
    if missing:
        raise InputError(
            f"no transcoders at layers {missing}: there are some at {sorted(transcoders)}"
        )
    tokens = lm.tokenize(prompt)
    tokens = tokens if prepend_bos else tokens[:, 1:]
    places = [i for i, t in enumerate(lm.token_strings(tokens[0].tolist())) if t == at_token]
    if not places:
        raise InputError(f"{prompt!r} has no token {at_token!r}")
    site = transcoders[layer].config.input_site
    with ExitStack() as stack:
        for lower in replaced:
            stack.enter_context(replace_mlp(lm, transcoders[lower]))
        mlp_in = lm.read(tokens, {site})[site]
    return float(transcoders[layer].encode(mlp_in)[0, places[-1], feature])


def prompt_activation_table(
    lm: LanguageModel, transcoders: Mapping[int, Dictionary]
) -> pd.DataFrame:
    """Every published activation beside ours: paper, ours, difference, verdict (within 0.005)."""
    lines = []
    for row in paper_table("prompt_activations"):
        ours = prompt_activation(
            lm,
            transcoders,
            int(row["layer"]),
            int(row["feature"]),
            row["prompt"],
            row["at_token"],
            row["prepend_bos"] == "true",
            layer_range(row["transcoder_layers_replaced"]),
        )
        difference = ours - float(row["activation"])
        verdict = "reproduced" if abs(difference) <= TOLERANCE else "mismatch"
        shown = {
            name: row[name] for name in ("layer", "feature", "prompt", "transcoder_layers_replaced")
        }
        shown |= {"paper": float(row["activation"]), "ours": ours}  # type: ignore[dict-item]
        lines.append({**shown, "difference": difference, "verdict": verdict})
    return pd.DataFrame(lines)


def layer_range(text: str) -> range:
    """none → no layers, 0-7 → 0 to 7."""
    if text == "none":
        return range(0)
    first, last = text.split("-")
    return range(int(first), int(last) + 1)
