"""A folder of trained dictionaries on the Hugging Face hub, with a model card that says what they are.

The card's figures are those of the run: sizes from the files, L0, FVU and CE recovered from the evaluation beside the
folder, tokens and objective from what training wrote into each file, the text from the run's first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.any import Format, write_any
from tclib.models.hub import check_hub_reachable
from tclib.support.errors import InputError, first_line
from tclib.support.files import load_tensors, new_folder
from tclib.support.paths import read_json

TEXT_STEP = "00_model_and_data"
EVALUATION = "_evaluation"
MEASURED = {"l0": "L0", "fvu": "FVU", "ce_recovered": "CE recovered"}
NOT_MEASURED = "not measured"
TAGS = ["transcoder", "sparse-dictionary", "mechanistic-interpretability"]


class Trained(NamedTuple):
    """A dictionary's file, what is in it, and how it was trained."""

    file: str
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
    found = [(path, Dictionary.load(path)) for path in files]
    said = [load_tensors(path, "restore it", is_checked=True)[1] for path in files]
    return [
        Trained(p.name, d, one.get("training", {})) for (p, d), one in zip(found, said, strict=True)
    ]


def model_card(folder: Path, trained: Sequence[Trained], repository: str, licence: str) -> str:
    """The README of a repository, front matter included."""
    models = sorted({one.dictionary.config.model for one in trained} - {""})
    front: dict[str, Any] = {"license": licence, "library_name": "tclib", "tags": TAGS}
    if len(models) == 1 and models[0].count("/") == 1:
        front["base_model"] = models[0]
    of = ", ".join(models) or "a model without a name"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Transcoders of {of}",
        _table(folder, trained),
        "Sites are hooks of TransformerLens with processed weights (`ln2.hook_normalized`: the norm's output without "
        "gain and bias). L0 is the mean number of active features a token, FVU the share of the output's variance "
        "that is left unexplained, CE recovered 1 for the original model and 0 for a mean-ablated MLP.",
        _training(folder, trained),
        _loading(trained[0], repository),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(folder: Path, trained: Sequence[Trained]) -> str:
    path = folder.with_name(folder.name + EVALUATION) / "table.csv"
    measured = pd.read_csv(path).set_index("name") if path.is_file() else None
    lines = []
    for one in trained:
        config, name = one.dictionary.config, Path(one.file).stem
        has = measured is not None and name in measured.index
        figures = {
            shown: f"{float(measured.loc[name, column]):.3g}"  # type: ignore[union-attr, arg-type]
            if has
            else NOT_MEASURED
            for column, shown in MEASURED.items()
        }
        lines.append(
            {
                "file": f"`{one.file}`",
                "kind": config.kind,
                "reads": f"`{config.input_site.hook_name}`",
                "writes": f"`{config.output_site.hook_name}`",
                "features": f"{config.n_features:,}",
                "activation": config.activation + (f", k {config.k}" if config.k else ""),
                **figures,
            }
        )
    names = list(lines[0])
    rows = [names, ["---"] * len(names), *([str(line[n]) for n in names] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _training(folder: Path, trained: Sequence[Trained]) -> str:
    """What was trained on how much of which text; empty for dictionaries that do not say."""
    said = next((one.training for one in trained if one.training), None)
    if said is None:
        return ""
    config, spec = said.get("config", {}), said.get("spec", {})
    manifest = folder.parent / TEXT_STEP / "manifest.json"
    corpus = read_json(manifest, "restore it")["parameters"]["corpus"] if manifest.is_file() else {}
    text = (
        f"{corpus['kind']}{f' ({source})' if (source := corpus.get('source')) else ''}"
        if corpus
        else ""
    )
    lines = {
        "tokens": f"{config.get('n_tokens', 0):,}",
        "text": text or "not said",
        "objective": spec.get("loss", "not said"),
        "batch": f"{config.get('batch_size', 0):,} tokens",
        "learning rate": str(spec.get("learning_rate") or config.get("learning_rate")),
        "seed": str(config.get("seed")),
    }
    return "## Training\n\n" + "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _loading(one: Trained, repository: str) -> str:
    return f"""## Loading

    pip install tclib huggingface_hub
    hf download {repository} --local-dir transcoders

    import tclib as tc

    dictionary = tc.load_dictionary("transcoders/{one.file}")
    lm = tc.LanguageModel.load("{one.dictionary.config.model or "…"}")
    frozen = tc.FrozenPrompts(lm, lm.tokenize("The cat sat on the"), [dictionary])

For other libraries `tclib convert transcoders/{one.file} OUT --to FORMAT` writes a folder that SAELens (`saelens`:
`SAE.load_from_disk`), circuit-tracer (`circuit-tracer`: all layers from 0) or eai-sparsify (`sparsify`: top-k in the raw
basis) loads."""


def stage(
    folder: Path, out: Path, repository: str, licence: str, to: Format = "tclib"
) -> list[Trained]:
    """Write into `out` what the repository will hold: dictionaries in a format, and README.md."""
    trained = read_folder(folder)
    with new_folder(out) as temporary:
        if to == "circuit-tracer":
            write_any(
                {t.dictionary.config.layer: t.dictionary for t in trained}, temporary / "set", to
            )
        else:
            for one in trained:
                name = one.file if to == "tclib" else Path(one.file).stem
                write_any({one.dictionary.config.layer: one.dictionary}, temporary / name, to)
        card = model_card(folder, trained, repository, licence)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return trained


def check_repository(repository: str) -> None:
    """Raise `InputError` unless it could be the id of a repository of one's own."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"repository {repository!r}: {first_line(error)}") from error
    if repository.count("/") != 1:
        raise InputError(f"repository {repository!r}: expected owner/name")


def push(staged: Path, repository: str, private: bool) -> str:
    """Make the repository and upload the staged folder; where it lies then.

    Errors: `InputError` for a hub that cannot be reached, refuses, or stops.
    """
    from huggingface_hub import HfApi

    check_hub_reachable(f"{repository} cannot be uploaded now")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=staged, commit_message="Transcoders")
    except OSError as error:
        raise InputError(
            f"the upload to {repository} stopped ({first_line(error)}): log in with `hf auth login` and a token that "
            "may write, then run the same command again"
        ) from error
    return str(url)
