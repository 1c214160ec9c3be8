"""Dictionaries of other libraries: read and written, with their bases converted exactly.

    saelens         a folder with cfg.json and sae_weights.safetensors
    circuit-tracer  a folder with config.yaml and layer_<i>.safetensors
    sparsify        a folder a hookpoint with cfg.json and sae.safetensors
    authors         the paper's .pt files, read only

All of them come in as `Dictionary` in the processed basis (norm gain folded into the encoder, decoder centred for
LayerNorm models). With γ, β the gain and bias of the norm in front of the MLP and P the centring projector:

    raw input  x_raw = x γ + β     W_enc ← γ W_enc      b_enc ← b_enc + β W_enc_raw
    raw output                     W_dec ← W_dec P      b_dec ← b_dec P       (what P takes out nobody reads)
    authors    input bias b        b_enc ← b_enc − b W_enc

A JumpReLU's thresholds are of pre-activations, which no change of basis moves. A trained batch top-k
dictionary is a JumpReLU one, and is written as such.

Nothing is ever unpickled with code in it: a .pt is read by an unpickler that knows tensors and plain values only.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tclib.dictionaries.dictionary import Activation, Dictionary, DictionaryConfig
from tclib.models.language_model import LanguageModel
from tclib.support.runs import InputError, new_folder

Format = Literal["tclib", "saelens", "circuit-tracer", "sparsify", "authors"]
FORMATS: tuple[Format, ...] = get_args(Format)
SAELENS_VERSION = "6.49.2"  # below 6 it rewrites the configuration as an old one
SAELENS_ARCHITECTURES: dict[str, tuple[Activation, bool]] = {  # activation, skip
    "transcoder": ("relu", False),
    "skip_transcoder": ("relu", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
TRACER_THRESHOLD = "activation_function.threshold"
HOOK_IN, HOOK_OUT = "blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"


# ---------------------------------------------------------------------------------------------
# Bases


def to_processed(dictionary: Dictionary, lm: LanguageModel) -> Dictionary:
    """A raw-basis transcoder in the processed basis; one that is processed already comes back as it is."""
    if dictionary.config.basis == "processed":
        return dictionary
    norm, centre = lm.mlp_norm(dictionary.config.layer), lm.final_norm.centre
    b_enc, b_dec = dictionary.b_enc, dictionary.b_dec
    if norm.bias is not None:
        b_enc = b_enc + norm.bias @ dictionary.W_enc
    W_skip = dictionary.W_skip
    if W_skip is not None:
        if norm.bias is not None:
            b_dec = b_dec + norm.bias @ W_skip
        W_skip = centre(norm.gain[:, None] * W_skip)
    return Dictionary(
        replace(dictionary.config, basis="processed"),
        norm.gain[:, None] * dictionary.W_enc,
        b_enc,
        centre(dictionary.W_dec),
        centre(b_dec),
        W_skip,
        dictionary.threshold,
    )


def to_raw(dictionary: Dictionary, lm: LanguageModel) -> Dictionary:
    """The inverse for the input side; the output stays centred, which nothing that reads it can tell.

    Errors: `InputError` where the norm has a gain of zero, through which nothing can be undone.
    """
    if dictionary.config.basis == "raw":
        return dictionary
    norm = lm.mlp_norm(dictionary.config.layer)
    if bool((norm.gain == 0).any()):
        raise InputError(
            f"layer {dictionary.config.layer} has norm gains of zero: no raw basis exists"
        )
    W_enc = dictionary.W_enc / norm.gain[:, None]
    W_skip = None if dictionary.W_skip is None else dictionary.W_skip / norm.gain[:, None]
    b_enc, b_dec = dictionary.b_enc, dictionary.b_dec
    if norm.bias is not None:
        b_enc = b_enc - norm.bias @ W_enc
        b_dec = b_dec if W_skip is None else b_dec - norm.bias @ W_skip
    config = replace(dictionary.config, basis="raw")
    return Dictionary(config, W_enc, b_enc, dictionary.W_dec, b_dec, W_skip, dictionary.threshold)


# ---------------------------------------------------------------------------------------------
# SAELens


def read_saelens(folder: Path) -> Dictionary:
    """A SAELens transcoder folder.

    Errors: `InputError` for another architecture, missing, extra or transposed tensors, a hook that is
    no MLP input, or anything that would change the equations.
    """
    config = _json(folder / "cfg.json")
    architecture = config.get("architecture")
    if architecture not in SAELENS_ARCHITECTURES:
        raise InputError(
            f"{folder}: architecture {architecture!r}; expected {', '.join(SAELENS_ARCHITECTURES)}"
        )
    for name, expected in (("apply_b_dec_to_input", False), ("normalize_activations", "none")):
        if config.get(name, expected) != expected:
            raise InputError(f"{folder}: {name} is {config[name]!r}; only {expected!r} can be read")
    metadata = config.get("metadata", {})
    layer = _layer_of(str(metadata.get("hook_name", "")), folder)
    tensors = _tensors(folder / "sae_weights.safetensors")
    activation, skip = SAELENS_ARCHITECTURES[architecture]
    sizes = {name: int(config[name]) for name in ("d_in", "d_out", "d_sae")}
    shapes = {
        "W_enc": (sizes["d_in"], sizes["d_sae"]),
        "b_enc": (sizes["d_sae"],),
        "W_dec": (sizes["d_sae"], sizes["d_out"]),
        "b_dec": (sizes["d_out"],),
    }
    shapes |= {"W_skip": (sizes["d_out"], sizes["d_in"])} if skip else {}
    shapes |= {"threshold": (sizes["d_sae"],)} if activation == "jumprelu" else {}
    _check_tensors(folder, tensors, shapes)
    if skip:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    if activation == "jumprelu":
        # There a relu stands before the jump, so that a threshold below 0 does what 0 does.
        tensors["threshold"] = tensors["threshold"].clamp_min(0.0)
    own = DictionaryConfig(
        "transcoder",
        layer,
        sizes["d_in"],
        sizes["d_out"],
        sizes["d_sae"],
        activation,
        skip=skip,
        model=str(metadata.get("model_name", "")),
        basis=_basis_of(str(metadata["hook_name"])),
    )
    return Dictionary(own, **tensors)


def write_saelens(dictionary: Dictionary, folder: Path) -> None:
    """A SAELens transcoder folder. Errors: `InputError` for a top-k or a non-transcoder dictionary."""
    _check_exportable(dictionary, "SAELens", ("relu", "jumprelu", "batch_topk"))
    config = dictionary.config
    kept = ("relu" if dictionary.threshold is None else "jumprelu", config.skip)
    architecture = next(name for name, held in SAELENS_ARCHITECTURES.items() if held == kept)
    tensors = {**dictionary.parameters()}
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    hook = HOOK_IN if config.basis == "processed" else "blocks.{layer}.hook_mlp_in"
    document = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_out": config.d_out,
        "d_sae": config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": config.model,
            "hook_name": hook.format(layer=config.layer),
            "hook_name_out": HOOK_OUT.format(layer=config.layer),
            "sae_lens_version": SAELENS_VERSION,
        },
    }
    with new_folder(folder) as temporary:
        save_file(_contiguous(tensors), temporary / "sae_weights.safetensors")
        (temporary / "cfg.json").write_text(json.dumps(document, indent=2))


# ---------------------------------------------------------------------------------------------
# circuit-tracer


def read_circuit_tracer(folder: Path) -> dict[int, Dictionary]:
    """A circuit-tracer transcoder set, by layer.

    Errors: `InputError` for a cross-layer set, negative thresholds, layers that are not contiguous
    from 0, or tensors that do not fit.
    """
    config = _yaml(folder / "config.yaml")
    kind = config.get("model_kind")
    if kind != "transcoder_set":
        raise InputError(f"{folder}: model_kind {kind!r}; expected transcoder_set")
    hook = str(config.get("feature_input_hook", ""))
    basis = _basis_of(f"blocks.0.{hook}")
    files = sorted(folder.glob("layer_*.safetensors"), key=lambda path: int(path.stem[6:]))
    if [int(path.stem[6:]) for path in files] != list(range(len(files))) or not files:
        raise InputError(
            f"{folder}: layers {[p.stem for p in files]}; expected layer_0 upwards, no gap"
        )
    activation, k = config.get("activation", "relu"), config.get("k")
    found = {}
    for layer, path in enumerate(files):
        tensors = _tensors(path)
        if "W_enc" not in tensors or tensors["W_enc"].ndim != 2:
            raise InputError(f"{path}: no matrix W_enc in it, only {sorted(tensors)}")
        n_features, d_model = tensors["W_enc"].shape
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (n_features, d_model),
            "W_dec": (n_features, d_model),
        }
        shapes |= {"b_enc": (n_features,), "b_dec": (d_model,)}
        shapes |= {"W_skip": (d_model, d_model)} if "W_skip" in tensors else {}
        has_threshold = TRACER_THRESHOLD in tensors
        shapes |= {TRACER_THRESHOLD: (n_features,)} if has_threshold else {}
        _check_tensors(path, tensors, shapes)
        if has_threshold:
            tensors["threshold"] = tensors.pop(TRACER_THRESHOLD)
        tensors["W_enc"] = tensors["W_enc"].T
        if "W_skip" in tensors:
            tensors["W_skip"] = tensors["W_skip"].T.contiguous()
        own = DictionaryConfig(
            "transcoder",
            layer,
            d_model,
            d_model,
            n_features,
            "jumprelu" if has_threshold else activation,
            None if has_threshold else k,
            "W_skip" in tensors,
            str(config.get("model_name", "")),
            basis,
        )
        found[layer] = Dictionary(own, **tensors)
    return found


def write_circuit_tracer(dictionaries: Mapping[int, Dictionary], folder: Path) -> None:
    """A circuit-tracer transcoder set of relu and JumpReLU transcoders for layers 0 upwards.

    Errors: `InputError` for gaps, or dictionaries that the format cannot hold: top-k ones come back as
    ReLU from a local folder there.
    """
    if sorted(dictionaries) != list(range(len(dictionaries))) or not dictionaries:
        raise InputError(f"layers {sorted(dictionaries)}: the format needs 0 upwards without a gap")
    for dictionary in dictionaries.values():
        _check_exportable(dictionary, "circuit-tracer", ("relu", "jumprelu", "batch_topk"))
    bases = {dictionary.config.basis for dictionary in dictionaries.values()}
    if len(bases) > 1:
        raise InputError("processed and raw dictionaries in one set: convert them to one basis")
    hook = "ln2.hook_normalized" if bases == {"processed"} else "hook_mlp_in"
    document = {
        "model_name": dictionaries[0].config.model,
        "model_kind": "transcoder_set",
        "feature_input_hook": hook,
        "feature_output_hook": "hook_mlp_out",
        "scan": dictionaries[0].config.model or "local",
    }
    with new_folder(folder) as temporary:
        for layer, dictionary in dictionaries.items():
            tensors = {**dictionary.parameters(), "W_enc": dictionary.W_enc.T}
            if dictionary.W_skip is not None:
                tensors["W_skip"] = dictionary.W_skip.T
            if dictionary.threshold is not None:
                tensors[TRACER_THRESHOLD] = tensors.pop("threshold")
            save_file(_contiguous(tensors), temporary / f"layer_{layer}.safetensors")
        (temporary / "config.yaml").write_text(yaml.safe_dump(document))


# ---------------------------------------------------------------------------------------------
# eai-sparsify


def read_sparsify(folder: Path) -> Dictionary:
    """A sparsify transcoder of one hookpoint (h.8.mlp, layers.8.mlp): raw basis, ReLU before top-k.

    Errors: `InputError` for an autoencoder, group-max, multi-topk, or tensors that do not fit.
    """
    config = _json(folder / "cfg.json")
    if not config.get("transcode", False):
        raise InputError(f"{folder}: transcode is false, an autoencoder; expected a transcoder")
    if config.get("activation", "topk") != "topk":
        raise InputError(f"{folder}: activation {config['activation']!r}; expected topk")
    parts = folder.name.split(".")
    numbers = [part for part in parts if part.isdigit()]
    if parts[-1] != "mlp" or len(numbers) != 1:
        raise InputError(f"{folder}: hookpoint {folder.name!r}; expected one like h.8.mlp")
    d_in = int(config["d_in"])
    n_features = int(config.get("num_latents") or d_in * int(config["expansion_factor"]))
    tensors = _tensors(folder / "sae.safetensors")
    skip = bool(config.get("skip_connection", False))
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (n_features, d_in),
        "encoder.bias": (n_features,),
        "W_dec": (n_features, d_in),
        "b_dec": (d_in,),
    }
    shapes |= {"W_skip": (d_in, d_in)} if skip else {}
    _check_tensors(folder, tensors, shapes)
    own = DictionaryConfig(
        "transcoder",
        int(numbers[0]),
        d_in,
        d_in,
        n_features,
        "topk",
        int(config["k"]),
        skip,
        basis="raw",
    )
    return Dictionary(
        own,
        tensors["encoder.weight"].T,
        tensors["encoder.bias"],
        tensors["W_dec"],
        tensors["b_dec"],
        tensors["W_skip"].T.contiguous() if skip else None,
    )


def write_sparsify(dictionary: Dictionary, folder: Path) -> None:
    """A sparsify folder of a raw-basis top-k transcoder. Errors: `InputError` for any other."""
    _check_exportable(dictionary, "sparsify", ("topk",))
    config = dictionary.config
    if config.basis != "raw":
        raise InputError("sparsify reads the MLP's raw input: convert with to_raw first")
    tensors = {
        "encoder.weight": dictionary.W_enc.T,
        "encoder.bias": dictionary.b_enc,
        "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    document = {
        "activation": "topk",
        "expansion_factor": max(1, config.n_features // config.d_in),
        "normalize_decoder": True,
        "num_latents": config.n_features,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": True,
        "d_in": config.d_in,
    }
    with new_folder(folder) as temporary:
        save_file(_contiguous(tensors), temporary / "sae.safetensors")
        (temporary / "cfg.json").write_text(json.dumps(document, indent=2))


# ---------------------------------------------------------------------------------------------
# The authors' .pt


@dataclass(frozen=True)
class PlainObject:
    """What stands for a pickled object of a foreign class: its name and its plain values."""

    class_name: str
    values: Mapping[str, Any]


def read_authors(path: Path) -> Dictionary:
    """A transcoder of the paper, with its input bias folded: b_enc ← b_enc − b_dec W_enc.

    Errors: `InputError` for a pickle that names anything but tensors and plain values, a truncated file,
    missing or transposed tensors, or a configuration that lies about its hook.
    """
    held = _unpickled(path)
    state, config = held.get("state_dict"), held.get("cfg")
    if not isinstance(state, Mapping) or not isinstance(config, PlainObject):
        raise InputError(f"{path}: expected cfg and state_dict, found {sorted(map(str, held))}")
    values = config.values
    if not values.get("is_transcoder", False):
        raise InputError(
            f"{path}: cfg.is_transcoder is not set, an autoencoder; expected a transcoder"
        )
    layer = _layer_of(str(values.get("hook_point", "")), path)
    if values.get("hook_point_layer", layer) != layer:
        raise InputError(
            f"{path}: hook_point {values['hook_point']!r} and hook_point_layer "
            f"{values['hook_point_layer']} name different layers"
        )
    d_in, d_out, n_features = (int(values.get(name, 0)) for name in ("d_in", "d_out", "d_sae"))
    shapes = {
        "W_enc": (d_in, n_features),
        "b_enc": (n_features,),
        "W_dec": (n_features, d_out),
        "b_dec": (d_in,),
        "b_dec_out": (d_out,),
    }
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    _check_tensors(path, tensors, shapes)
    basis = _basis_of(str(values["hook_point"]))
    model = str(values.get("model_name", ""))
    own = DictionaryConfig("transcoder", layer, d_in, d_out, n_features, model=model, basis=basis)
    b_enc = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    return Dictionary(own, tensors["W_enc"], b_enc, tensors["W_dec"], tensors["b_dec_out"])


class _Unpickler(pickle.Unpickler):
    """Knows tensors and plain values; a foreign configuration class becomes a `PlainObject`.

    Any other name is refused, so that no code of the file can run.
    """

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        super().__init__(file)
        self.archive, self.root, self.path = archive, root, path

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for. Errors: `InputError` for any name that is not known."""
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt_tensor,
            ("torch", "FloatStorage"): torch.float32,
            ("torch", "HalfStorage"): torch.float16,
            ("torch", "BFloat16Storage"): torch.bfloat16,
            ("torch", "DoubleStorage"): torch.float64,
            ("torch", "LongStorage"): torch.int64,
            ("torch", "float32"): torch.float32,
            ("torch", "bfloat16"): torch.bfloat16,
            ("torch", "device"): _device_name,
            ("builtins", "str"): str,
        }
        if (module, name) in known:
            return known[module, name]
        if (module, name) == ("sae_training.config", "LanguageModelSAERunnerConfig"):
            return _Configuration
        raise InputError(
            f"{self.path} asks for {module}.{name} while it is read: a weights file holds tensors and "
            "plain values only, and nothing else is ever run; get it from a source that you trust"
        )

    def persistent_load(self, reference: Any) -> Tensor:
        kind, dtype, key, _location, _size = reference
        if kind != "storage":
            raise InputError(f"{self.path}: unknown reference {kind!r}: not a torch file")
        data = self.archive.read(f"{self.root}/data/{key}")
        return torch.frombuffer(bytearray(data), dtype=dtype)


class _Configuration:
    """Takes the attributes of the authors' configuration, without their class."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _rebuilt_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _device_name(kind: str, index: int | None = None) -> str:
    return kind if index is None else f"{kind}:{index}"


def _unpickled(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            root = name.removesuffix("/data.pkl")
            held = _Unpickler(io.BytesIO(archive.read(name)), archive, root, path).load()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is truncated or no torch file ({error}): download it again"
        ) from error
    if not isinstance(held, Mapping):
        raise InputError(f"{path} holds a {type(held).__name__}: expected cfg and state_dict")
    return {
        name: PlainObject("LanguageModelSAERunnerConfig", vars(value))
        if isinstance(value, _Configuration)
        else value
        for name, value in held.items()
    }


# ---------------------------------------------------------------------------------------------
# Any format


class Found(NamedTuple):
    """What lies at a path: its format, and the dictionaries by layer."""

    format: Format
    dictionaries: dict[int, Dictionary]


def read_any(path: Path) -> Found:
    """Recognise a format by its files and read it. Errors: `InputError` if none is recognised."""
    if path.suffix == ".pt":
        one = read_authors(path)
        return Found("authors", {one.config.layer: one})
    if path.suffix == ".safetensors" and path.is_file():
        one = Dictionary.load(path)
        return Found("tclib", {one.config.layer: one})
    if (path / "sae_weights.safetensors").is_file():
        one = read_saelens(path)
        return Found("saelens", {one.config.layer: one})
    if (path / "sae.safetensors").is_file():
        one = read_sparsify(path)
        return Found("sparsify", {one.config.layer: one})
    if (path / "config.yaml").is_file():
        return Found("circuit-tracer", read_circuit_tracer(path))
    raise InputError(
        f"{path}: no known dictionary; expected a .safetensors of tclib, a .pt of the authors, or a folder "
        "of SAELens (sae_weights.safetensors), sparsify (sae.safetensors) or circuit-tracer (config.yaml)"
    )


def write_any(dictionaries: Mapping[int, Dictionary], out: Path, kind: Format) -> None:
    """Write in a format. Errors: `InputError` for one that holds a single dictionary, or is read only."""
    if kind == "circuit-tracer":
        write_circuit_tracer(dictionaries, out)
        return
    if kind == "authors":
        raise InputError(
            "the authors' .pt is read only: a pickle is never written; choose another format"
        )
    if len(dictionaries) != 1:
        raise InputError(
            f"{kind} holds one dictionary, not layers {sorted(dictionaries)}: one at a time"
        )
    (one,) = dictionaries.values()
    if kind == "saelens":
        write_saelens(one, out)
    elif kind == "sparsify":
        write_sparsify(one, out)
    else:
        one.save(out)


# ---------------------------------------------------------------------------------------------
# Checks


def _layer_of(hook: str, where: Path) -> int:
    parts = hook.split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdigit():
        raise InputError(f"{where}: hook {hook!r}; expected one like blocks.8.ln2.hook_normalized")
    _basis_of(hook)
    return int(parts[1])


def _basis_of(hook: str) -> Literal["processed", "raw"]:
    if hook.endswith("ln2.hook_normalized"):
        return "processed"
    if hook.endswith(("hook_mlp_in", "mlp.hook_in")):
        return "raw"
    raise InputError(f"hook {hook!r} is no MLP input: expected ln2.hook_normalized or mlp.hook_in")


def _check_exportable(dictionary: Dictionary, name: str, activations: tuple[str, ...]) -> None:
    config = dictionary.config
    if config.kind != "transcoder" or config.activation not in activations:
        raise InputError(
            f"{name} cannot hold a {config.activation} {config.kind}: expected a transcoder with "
            f"{' or '.join(activations)}"
        )


def _check_tensors(
    where: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or extra:
        raise InputError(f"{where}: tensors missing {missing}, not expected {extra}")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            hint = " (transposed?)" if found == shape[::-1] else ""
            raise InputError(f"{where}: {name} has shape {found}{hint}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise InputError(f"{where}: {name} is {tensors[name].dtype}, expected floating point")


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing: expected the weights there")
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): download it again") from error


def _json(path: Path) -> dict[str, Any]:
    return _read_config(path, json.loads)


def _yaml(path: Path) -> dict[str, Any]:
    return _read_config(path, yaml.safe_load)


def _read_config(path: Path, parse: Any) -> dict[str, Any]:
    try:
        held = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): expected the configuration there"
        ) from error
    if not isinstance(held, dict):
        raise InputError(f"{path} holds a {type(held).__name__}: expected names and values")
    return held


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}
