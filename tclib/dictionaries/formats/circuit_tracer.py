"""circuit-tracer: a folder with config.yaml and layer_<i>.safetensors, or a list of files of the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats import parts
from tclib.dictionaries.formats.gemma_scope import NPZ, SAFETENSORS, read_gemma_scope
from tclib.models.hub import hub_file
from tclib.support.declared import shown
from tclib.support.errors import InputError, listed
from tclib.support.files import new_folder

MAX_LAYERS = 1_000  # of which every one is read
TRACER_THRESHOLD = "activation_function.threshold"
TENSORS = parts.Tensors({"threshold": TRACER_THRESHOLD}, frozenset({"W_enc", "W_skip"}))
HUB = "hf://"
OWN_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")  # of a repository's id
OWN_NAME = re.compile(r"layer_\d+\.safetensors")
K = "k"  # of top-k: in the configuration, or a tensor


@dataclass(frozen=True)
class _Said:
    """What a set's configuration says of all its layers."""

    folder: Path
    config: Mapping[str, Any]
    hooks: tuple[str, str]  # of layer 0
    model: str
    model_hash: str
    k: int | None


def read_circuit_tracer(
    folder: Path,
    layers: Iterable[int] | None = None,
    lazy: bool = False,
    k: int | None = None,
) -> dict[int, Dictionary]:
    """A circuit-tracer transcoder set by layer: all of it, or only `layers`, whose files alone are touched.

    Files that its list gives as hf:// are taken from the local cache, or fetched. `k` is of a top-k set that does not
    say its own. Errors: `InputError` for a cross-layer set, a hook that is not an MLP's or not said (circuit-tracer
    itself needs both), negative thresholds, layers that are not contiguous from 0, or tensors that do not fit.
    """
    said = _said(folder, k)
    paths = _paths(said, None if layers is None else list(layers))
    return {layer: _read_layer(said, layer, path, lazy) for layer, path in paths.items()}


def _said(folder: Path, k: int | None) -> _Said:
    config = parts.read_config(folder / "config.yaml")
    # Its first version wrote no kind, and knew no other.
    kind = parts.entry(config, "model_kind", str, folder, "transcoder_set")
    if kind != "transcoder_set":
        raise InputError(f"{folder}: model_kind {kind!r}; expected transcoder_set")
    hook_in, hook_out = (
        f"blocks.0.{parts.entry(config, f'feature_{end}_hook', str, folder)}"
        for end in ("input", "output")
    )
    model, model_hash = (
        parts.entry(config, name, str, folder, "") for name in ("model_name", parts.HASH)
    )
    parts.check_same(config, {"scaling_factor": 1.0, "normalize": None}, folder)
    own_k = parts.entry(config, K, int, folder, 0) or (
        k if config.get("activation") == "topk" else None
    )
    return _Said(folder, config, (hook_in, hook_out), model, model_hash, own_k)


def _paths(said: _Said, layers: list[int] | None) -> dict[int, Path]:
    folder, given = said.folder, parts.entry(said.config, "transcoders", list, said.folder, [])
    if len(given) > MAX_LAYERS:
        raise InputError(f"{folder}: {len(given):,} layers; expected at most {MAX_LAYERS:,}")
    files = _listed(given, folder)
    if any(_is_elsewhere(name, folder) for name in files):
        wanted = range(len(files)) if layers is None else layers
        _check_layers(wanted, len(files), folder)
        return {layer: _of_list(files[layer], folder) for layer in wanted}
    if layers is None:
        return dict(enumerate(_whole_folder(files, folder)))
    found = {layer: folder / f"layer_{layer}.safetensors" for layer in layers}
    for layer, path in found.items():
        if not path.is_file():
            held = [
                one for one in range(MAX_LAYERS) if (folder / f"layer_{one}.safetensors").is_file()
            ]
            raise InputError(f"{folder} holds layers {held}: give one of them, not {layer}")
    return found


def _listed(given: list[Any], folder: Path) -> list[str]:
    """The list's files in the order of layers; the first version wrote an id, a layer and a path of each."""
    files = []
    for layer, one in enumerate(given):
        of_dict = isinstance(one, dict)
        if of_dict and one.get("layer") != layer:
            raise InputError(
                f"{folder}: transcoder {layer} of its list is of layer {one.get('layer')!r}: expected them in order"
            )
        name = one.get("filepath") if of_dict else one
        if not isinstance(name, str):
            raise InputError(
                f"{folder}: transcoder {layer} of its list is {shown(one)}: expected a file's name"
            )
        last = name.split("/")[-1]
        is_ours = not name.startswith(HUB) or OWN_NAME.fullmatch(last)
        if is_ours and last != f"layer_{layer}.safetensors":
            raise InputError(
                f"{folder}: transcoder {layer} of its list is {shown(name)}; expected "
                f"layer_{layer}.safetensors: files are read by their names"
            )
        files.append(name)
    return files


def _check_layers(wanted: Iterable[int], n_layers: int, folder: Path) -> None:
    missing = sorted(layer for layer in wanted if not 0 <= layer < n_layers)
    if missing:
        raise InputError(f"{folder}: layers {missing}: the set has 0 to {n_layers - 1}")


def _is_elsewhere(name: str, folder: Path) -> bool:
    return name.startswith(HUB) and not (folder / name.split("/")[-1]).is_file()


def _of_list(name: str, folder: Path) -> Path:
    """A file of the list: on the hub as hf://owner/repository/path?revision=…, or else beside the list."""
    if not _is_elsewhere(name, folder):
        return folder / name.split("/")[-1]
    path, _, query = name.removeprefix(HUB).partition("?")
    owner, _, rest = path.partition("/")
    repository, _, file = rest.partition("/")
    if not (OWN_PART.fullmatch(owner) and OWN_PART.fullmatch(repository) and file):
        raise InputError(
            f"{folder}: {shown(name)} of its list: expected hf://owner/repository/path"
        )
    revision = parse_qs(query).get("revision", ["main"])[0]
    return hub_file(f"{owner}/{repository}", file, revision)


def _whole_folder(files: list[str], folder: Path) -> list[Path]:
    names = {path.name for path in folder.glob("layer_*.safetensors")}
    if len(names) > MAX_LAYERS:
        raise InputError(f"{folder}: {len(names):,} layers; expected at most {MAX_LAYERS:,}")
    found = [folder / f"layer_{layer}.safetensors" for layer in range(len(names))]
    if names != {path.name for path in found} or not names:
        raise InputError(f"{folder}: layers [{listed(names)}]; expected layer_0 upwards, no gap")
    if files and len(files) != len(found):
        raise InputError(
            f"{folder}: its list names {len(files)} transcoders, and it holds {len(found)}: fetch all"
        )
    return found


def _read_layer(said: _Said, layer: int, path: Path, lazy: bool) -> Dictionary:
    if path.name in (NPZ, SAFETENSORS):
        found = read_gemma_scope(path, lazy)
        _, basis = parts.basis_of(said.hooks[0], said.folder)
        if (found.config.layer, found.config.basis) != (layer, basis):
            raise InputError(
                f"{said.folder}: transcoder {layer} of its list is {path}, which is of layer {found.config.layer} and "
                f"in the {found.config.basis} basis; expected layer {layer}, in the {basis} one, as {said.hooks[0]} says"
            )
        return found.renamed(replace(found.config, model=said.model, model_hash=said.model_hash))
    tensors = parts.read_tensors(path)
    if "W_enc" not in tensors or tensors["W_enc"].ndim != 2:
        raise InputError(f"{path}: no matrix W_enc in it, only {listed(tensors)}")
    config = _layer_config(said, layer, tensors, path)
    return TENSORS.dictionary(path, {n: t for n, t in tensors.items() if n != K}, config, lazy)


def _k_of(held: Tensor, path: Path) -> int:
    value = float(held) if held.numel() == 1 else math.nan
    if not (value >= 1 and value == value // 1):
        raise InputError(
            f"{path}: its k is {shown(held.tolist())}; expected one whole number from 1"
        )
    return int(value)


def _layer_config(
    said: _Said, layer: int, tensors: Mapping[str, Tensor], path: Path
) -> DictionaryConfig:
    _, basis = parts.place_of(*said.hooks, said.folder, said.model)
    n_features, d_model = tensors["W_enc"].shape
    activation: Any = parts.entry(said.config, "activation", str, said.folder, "relu")
    k = _k_of(tensors[K], path) if K in tensors else said.k
    if TRACER_THRESHOLD in tensors:
        activation, k = "jumprelu", None
    if activation == "topk" and k is None:
        raise InputError(
            f"{said.folder}: activation topk without a k: say it in config.yaml (circuit-tracer itself takes 128 for "
            "facebook/crv-8b-instruct-transcoders)"
        )
    skip = "W_skip" in tensors
    parts.check_same(
        said.config, {"skip_connection": skip, "activation_function": activation}, path
    )
    sizes = (d_model, d_model, n_features)
    return DictionaryConfig(
        *("transcoder", layer, *sizes, activation, k, skip),
        model=said.model,
        basis=basis,
        model_hash=said.model_hash,
    )


def write_circuit_tracer(dictionaries: Mapping[int, Dictionary], folder: Path) -> None:
    """A circuit-tracer transcoder set of relu and JumpReLU transcoders for layers 0 upwards.

    Errors: `InputError` for gaps, several models or bases, or dictionaries that the format cannot hold:
    top-k ones come back as ReLU from a local folder there.
    """
    if sorted(dictionaries) != list(range(len(dictionaries))) or not dictionaries:
        raise InputError(f"layers {sorted(dictionaries)}: the format needs 0 upwards without a gap")
    for dictionary in dictionaries.values():
        parts.check_exportable(dictionary, "circuit-tracer", parts.JUMPS)
    first = dictionaries[0].config
    for config in (dictionary.config for dictionary in dictionaries.values()):
        if config.basis != first.basis:
            raise InputError("processed and raw dictionaries in one set: convert them to one basis")
        if (config.model, config.model_hash) != (first.model, first.model_hash):
            raise InputError(
                f"layers 0 and {config.layer} were trained on different models: a set is of one model"
            )
    document = {
        "model_name": first.model,
        "model_kind": "transcoder_set",
        "feature_input_hook": parts.HOOK_IN[first.basis],
        "feature_output_hook": parts.HOOK_OUT,
        "scan": first.model or "local",
        parts.HASH: first.model_hash,
    }
    with new_folder(folder) as temporary:
        for layer, dictionary in dictionaries.items():
            TENSORS.save(dictionary, temporary / f"layer_{layer}.safetensors")
        (temporary / "config.yaml").write_text(yaml.safe_dump(document))
