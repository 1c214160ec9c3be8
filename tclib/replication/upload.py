"""A folder of trained dictionaries on the Hugging Face hub, with a model card that says what they are.

The card's figures are those of the run: sizes from the files, L0, FVU and CE recovered from the evaluation beside the
folder, tokens and objective from what training wrote into each file, the text from the run's first step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.any import Format, write_any
from tclib.dictionaries.formats.parts import HOOK_IN, HOOK_OUT
from tclib.models.hub import check_hub_reachable, check_repository_id
from tclib.support.errors import InputError, first_line
from tclib.support.files import load_tensors, new_folder
from tclib.support.paths import read_json

TEXT_STEP = "00_model_and_data"
EVALUATION = "_evaluation"
MEASURED = {"l0": "L0", "fvu": "FVU", "ce_recovered": "CE recovered"}
NOT_MEASURED, NOT_SAID = "not measured", "not said"
TAGS = ["transcoder", "sparse-dictionary", "mechanistic-interpretability"]
SET = "set"  # what the one folder of a circuit-tracer set is called
SITES = (
    "Sites are hooks of TransformerLens: `ln2.hook_normalized` is the norm's output without gain and bias (its weights "
    "processed), `mlp.hook_in` with them, `hook_resid_mid` the stream in front of the norm. L0 is the mean number of "
    "active features a token, FVU the share of the output's variance that is left unexplained, CE recovered 1 for the "
    "original model and 0 for a mean-ablated MLP."
)


class Trained(NamedTuple):
    """A dictionary's file, what is in it, and how it was trained."""

    name: str
    dictionary: Dictionary
    training: Mapping[str, Any]


def read_folder(folder: Path) -> list[Trained]:
    """The tclib dictionaries of a folder. Errors: `InputError` if there is none, or training has not ended."""
    files = sorted(folder.glob("*.safetensors"))
    unfinished = [path for path in files if "checkpoint" in path.name]
    if unfinished:
        raise InputError(
            f"{unfinished[0]}: training has not ended: run the same command to its end"
        )
    if not files:
        raise InputError(
            f"{folder}: no dictionary in it: expected .safetensors of tclib, as notebook 01 and `tclib train` write them"
        )
    found = []
    for path in files:
        one = Dictionary.load(path)
        said = load_tensors(path, "restore it", is_checked=True)[1].get("training")
        found.append(Trained(path.stem, one, said if isinstance(said, dict) else {}))
    return found


def places(trained: Sequence[Trained], to: Format) -> list[str]:
    """Where each dictionary lies in the repository. Errors: `InputError` for two in one place."""
    layers = [one.dictionary.config.layer for one in trained]
    names = {
        "tclib": [f"{one.name}.safetensors" for one in trained],
        "circuit-tracer": [f"{SET}/layer_{layer}.safetensors" for layer in layers],
        "sparsify": [f"layers.{layer}.mlp" for layer in layers],
    }.get(to, [one.name for one in trained])
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        which = [one.name for one, name in zip(trained, names, strict=True) if name == twice[0]]
        raise InputError(
            f"{' and '.join(which)} are both of one layer: a {to} repository holds one a layer; upload as tclib, or "
            "from a folder with one of them"
        )
    return names


def model_card(
    folder: Path, trained: Sequence[Trained], repository: str, licence: str, to: Format = "tclib"
) -> str:
    """The README of a repository, front matter included."""
    models = sorted({one.dictionary.config.model for one in trained} - {""})
    front: dict[str, Any] = {"license": licence, "library_name": "tclib", "tags": TAGS}
    if len(models) == 1 and models[0].count("/") == 1 and not models[0].startswith("."):
        front["base_model"] = models[0]
    kinds = "Dictionaries" if any(_is_sae(one) for one in trained) else "Transcoders"
    where = places(trained, to)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {kinds} of {', '.join(models) or 'a model without a name'}",
        _table(folder, trained, where),
        SITES,
        _training(folder, trained),
        _loading(trained[0], where[0], repository, to),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_sae(one: Trained) -> bool:
    return one.dictionary.config.kind != "transcoder"


def _table(folder: Path, trained: Sequence[Trained], where: Sequence[str]) -> str:
    measured = _measured(folder.absolute())
    lines = []
    for one, place in zip(trained, where, strict=True):
        config = one.dictionary.config
        block, sites = f"blocks.{config.layer}", (config.input_site, config.output_site)
        reads, writes = (site.hook_name for site in sites)
        if not _is_sae(one):
            reads, writes = f"{block}.{HOOK_IN[config.basis]}", f"{block}.{HOOK_OUT}"
        lines.append(
            {
                "file": f"`{place}`",
                "kind": config.kind,
                "reads": f"`{reads}`",
                "writes": f"`{writes}`",
                "features": f"{config.n_features:,}",
                "activation": config.activation + (f", k {config.k}" if config.k else ""),
                **measured.get(one.name, dict.fromkeys(MEASURED.values(), NOT_MEASURED)),
            }
        )
    names = list(lines[0])
    rows = [names, ["---"] * len(names), *([line[n] for n in names] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _measured(folder: Path) -> dict[str, dict[str, str]]:
    """L0, FVU and CE recovered by name, of the evaluation beside the folder; empty where there is none."""
    path = folder.with_name(folder.name + EVALUATION) / "table.csv"
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path)
        names, figures = table["name"].tolist(), table[list(MEASURED)].astype(float)
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{path} is no evaluation of tclib ({first_line(error)}): make it again, or move it away"
        ) from error
    shown = figures.rename(columns=MEASURED).map("{:.3g}".format).to_dict("records")
    return {
        str(name): {str(k): v for k, v in line.items()}
        for name, line in zip(names, shown, strict=True)
    }


def _training(folder: Path, trained: Sequence[Trained]) -> str:
    """What was trained on how much of which text; empty for dictionaries that do not say."""
    said = next((one.training for one in trained if one.training), None)
    if said is None:
        return ""
    config, spec = said.get("config", {}), said.get("spec", {})
    lines = {
        "tokens": _counted(config.get("n_tokens")),
        "text": _text(folder.absolute().parent / TEXT_STEP / "manifest.json"),
        "objective": spec.get("loss", NOT_SAID),
        "tokens a batch": _counted(config.get("batch_size")),
        "learning rate": spec.get("learning_rate") or config.get("learning_rate", NOT_SAID),
        "seed": config.get("seed", NOT_SAID),
    }
    return "## Training\n\n" + "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _counted(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NOT_SAID


def _text(manifest: Path) -> str:
    """What a run's first step says of its text."""
    held = read_json(manifest, "restore it") if manifest.is_file() else {}
    parameters = held.get("parameters") if isinstance(held, dict) else None
    corpus = parameters.get("corpus") if isinstance(parameters, dict) else None
    if not isinstance(corpus, dict) or "kind" not in corpus:
        return NOT_SAID
    return f"{corpus['kind']} ({corpus['source']})" if corpus.get("source") else str(corpus["kind"])


def _loading(one: Trained, place: str, repository: str, to: Format) -> str:
    config = one.dictionary.config
    asked = f", layer={config.layer}" if to == "circuit-tracer" else ""
    path = f"transcoders/{SET if to == 'circuit-tracer' else place}"
    changed = "    dictionary = tc.to_processed(dictionary, lm)\n" if config.basis == "raw" else ""
    others = {
        "tclib": f"For other libraries `tclib convert {path} OUT --to FORMAT` writes a folder that SAELens "
        "(`saelens`: `load_from_disk`), circuit-tracer (`circuit-tracer`: all layers from 0) or eai-sparsify "
        "(`sparsify`: top-k in the raw basis) loads.",
        "saelens": f"SAELens: `load_from_disk('{path}')` of its transcoder classes.",
        "circuit-tracer": f"circuit-tracer: `ReplacementModel.from_pretrained(MODEL, '/full/path/to/{path}')`.",
        "sparsify": f"eai-sparsify: `SparseCoder.load_from_disk('{path}')`.",
    }[to]
    return f"""## Loading

    pip install tclib huggingface_hub
    hf download {repository} --local-dir transcoders

    import tclib as tc

    lm = tc.LanguageModel.load("{config.model or "…"}")
    dictionary = tc.load_dictionary("{path}"{asked})
{changed}    frozen = tc.FrozenPrompts(lm, lm.tokenize("The cat sat on the"), [dictionary])

{others}"""


def stage(
    folder: Path, out: Path, repository: str, licence: str, to: Format = "tclib"
) -> list[Trained]:
    """Write into `out` what the repository will hold: dictionaries in a format, and README.md.

    Errors: `InputError` for dictionaries that the format cannot hold, or an empty licence.
    """
    if not licence.strip():
        raise InputError(
            "licence '': expected one, as the hub names it (mit, apache-2.0, cc-by-4.0)"
        )
    trained = read_folder(folder)
    card = model_card(folder, trained, repository, licence, to)
    with new_folder(out) as temporary:
        if to == "circuit-tracer":
            by_layer = {one.dictionary.config.layer: one.dictionary for one in trained}
            write_any(dict(sorted(by_layer.items())), temporary / SET, to)
        else:
            for one, place in zip(trained, places(trained, to), strict=True):
                write_any({one.dictionary.config.layer: one.dictionary}, temporary / place, to)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return trained


def check_repository(repository: str) -> None:
    """Raise `InputError` unless it could be the id of a repository of one's own."""
    check_repository_id(repository, "repository")
    if repository.count("/") != 1:
        raise InputError(f"repository {repository!r}: expected owner/name")


def push(staged: Path, repository: str, private: bool) -> str:
    """Make the repository, unless it is there, and upload the staged folder; where it lies then.

    Errors: `InputError` for a hub that cannot be reached, refuses, or stops, or a public repository that was to be
    private.
    """
    from huggingface_hub import HfApi

    check_hub_reachable(f"{repository} cannot be uploaded now")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        is_open = private and not api.repo_info(repository).private
        if not is_open:
            api.upload_folder(repo_id=repository, folder_path=staged, commit_message="Transcoders")
    except Exception as error:  # of the hub, of its http library, of the disk
        raise InputError(
            f"the upload to {repository} stopped ({first_line(error)}): log in with `hf auth login` and a token that "
            "may write, then run the same command again"
        ) from error
    if is_open:
        raise InputError(
            f"{repository} is there already, and public: nothing was uploaded; choose another name, make it private on "
            "the hub, or leave out --private"
        )
    return str(url)
