"""The paper's own .pt files, read only."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats.parts import basis_of, check_tensors, layer_of
from tclib.support.errors import InputError


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
    layer = layer_of(str(values.get("hook_point", "")), path)
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
    check_tensors(path, tensors, shapes)
    basis = basis_of(str(values["hook_point"]))
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
