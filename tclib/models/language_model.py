"""A frozen language model behind one object: tokens, forward passes, weights in the processed basis.

Together with `architectures` and `locate` the only modules that know transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tclib.models.architectures import NORM_NAMES
from tclib.models.checks import (
    check_demand,
    check_files,
    check_hooks,
    check_module,
    check_report,
    check_tokenizer,
)
from tclib.models.identity import folder_state, keep_hash, kept_hash, model_hash
from tclib.models.interop import plain_model
from tclib.models.locate import locate, quiet_transformers
from tclib.models.running import Running
from tclib.support.checked import checked
from tclib.support.declared import whole
from tclib.support.errors import InputError, first_line
from tclib.support.torch_types import Device, FloatType

METASPACE = "▁"
HALF_PRECISION = (torch.float16, torch.bfloat16)


class LanguageModel(Running):
    """A frozen transformers model with named MLP sites and processed weights.

    Args:
        model: a transformers model of a known class (`architectures.ARCHITECTURES`).
        tokenizer: its fast tokenizer.
        name: how messages and manifests call it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "model") -> None:
        super().__init__(model, name)
        check_module(model, name)
        check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, name)
        self.tokenizer = tokenizer
        self._location: str | None = None
        self.was_rounded = False

    @property
    def is_rounded(self) -> bool:
        """Whether the weights are in half precision, or were before they were copied."""
        return self.was_rounded or self.dtype in HALF_PRECISION

    @property
    def content_hash(self) -> str:
        """sha256 of the weights and of how they act: the model's identity, whatever its name.

        Errors: `InputError` while hooks are on the model, whose doing no hash shows.
        """
        check_hooks(self.model, self.name)
        return model_hash(self.model)

    @property
    def known_hash(self) -> str:
        """`content_hash`, computed when the model was loaded or edited.

        Empty for weights in half precision, whose hash is not that of the model.
        """
        if self.is_rounded:
            return ""
        return self.derived("known_hash", lambda: model_hash(self.model), self.model)

    @property
    def known_as(self) -> str:
        """The name by which anyone finds this model: a bundled one's, or its id on the hub.

        Empty for a folder, which may be called anything, and for a model that was given by hand.
        """
        is_found = self._location is not None and not Path(self.name).expanduser().is_dir()
        return self.name if is_found else ""

    @classmethod
    @checked
    def load(
        cls, name: str | Path, device: Device | None = None, dtype: FloatType = torch.float32
    ) -> LanguageModel:
        """Load `demo`, `demo-neox`, `smollm2`, a local Hugging Face folder or a hub id.

        By default on CUDA where there is one, else on the CPU.
        Errors: `InputError` if the model is nowhere to be had, of an unsupported geometry or quantised,
        if any of its tensors is missing, unexpected or of another shape, or if its tokenizer cannot be
        the model's.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = str(name)
        location = locate(name)
        quiet_transformers()
        before = folder_state(location)
        try:
            check_files(location, name)
            check_demand(location, name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                location,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
            model, report = loaded
            check_report(report, name, location)
            keep_hash(model, location, before)
            tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        except InputError:
            raise
        except Exception as error:  # wrong values in a configuration raise all kinds
            raise InputError(
                f"model {name!r} could not be read from {location} ({first_line(error)}): "
                "is the folder a complete Hugging Face model?"
            ) from error
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        lm = cls(model.to(device), tokenizer, name)
        lm._location = location
        if not lm.is_rounded and (kept := kept_hash(location, dtype)):
            lm.derived("known_hash", lambda: kept, lm.model)  # so that it is not computed again
        return lm

    @classmethod
    def from_transformer_lens(cls, bridge: Any) -> LanguageModel:
        """The model that a `TransformerBridge` of TransformerLens runs; its weights are copied.

        Errors: `InputError` for anything else, or for a bridge in compatibility mode, which has folded the norms
        into its weights.
        """
        return cls(*plain_model(bridge))

    def summary(self) -> dict[str, object]:
        """The geometry, for a table."""
        return {
            "model": self.name,
            "layers": self.n_layers,
            "d_model": self.d_model,
            "heads": self.n_heads,
            "context (tokens)": self.n_ctx,
            "vocabulary": self.d_vocab,
            "blocks": "parallel" if self.is_parallel else "sequential",
            "norm": NORM_NAMES[self.norm_kind],
            "positions": self._architecture.positions,
        }

    @property
    def bos_id(self) -> int:
        """The token that opens every row: the tokenizer's BOS, else its EOS."""
        token_id = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if token_id is None else token_id)

    def check_context(self, n_ctx: int) -> int:
        """`n_ctx`, if the model's context is that long; else `InputError`."""
        if not 2 <= whole("n_ctx", n_ctx) <= self.n_ctx:
            raise InputError(
                f"context of {n_ctx} tokens: {self.name} takes 2 to {self.n_ctx}; set n_ctx accordingly"
            )
        return n_ctx

    def check_text(self, rows: Int[Tensor, "row pos"]) -> None:
        """Raise `InputError` unless `rows` are tokens, and some of them are predicted and no BOS."""
        self.check_tokens(rows)
        if rows.shape[1] < 2:
            raise InputError(f"rows of 1 token: expected 2 to {self.n_ctx}, the first of them BOS")
        if not bool((rows != self.bos_id).any()):
            raise InputError("rows hold nothing but BOS: expected text")

    @checked
    def tokenize(self, text: str) -> Int[Tensor, "1 pos"]:
        """Token ids of `text` with BOS in front.

        Errors: `InputError` for a text with words outside a closed vocabulary, longer than
        the context, or with half a surrogate pair.
        """
        try:
            ids = [self.bos_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        except (UnicodeError, TypeError) as error:
            raise InputError(
                f"{text!r} holds half a surrogate pair, which is no character: remove it"
            ) from error
        unknown_id = self.tokenizer.unk_token_id
        if unknown_id is not None and unknown_id != self.bos_id and unknown_id in ids:
            raise InputError(
                f"{text!r} has words that {self.name} does not know; "
                "use words of its vocabulary (lm.tokenizer.get_vocab())"
            )
        if len(ids) > self.n_ctx:
            raise InputError(
                f"{len(ids)} tokens with BOS, but {self.name} takes at most {self.n_ctx}: shorten it"
            )
        return torch.tensor([ids], device=self.device)

    def token_strings(self, ids: Iterable[int] | Int[Tensor, "token"]) -> list[str]:
        """The text of each token by itself, with the space in front of it where it has one."""
        listed = [whole("token id", i) for i in ids]
        if listed and not 0 <= min(listed) <= max(listed) < self.d_vocab:
            raise InputError(
                f"token ids {listed}: {self.name} has ids from 0 to {self.d_vocab - 1}"
            )
        return [self._token_string(i) for i in listed]

    def _token_string(self, token_id: int) -> str:
        text = str(self.tokenizer.decode([token_id]))
        # Metaspace decoders (Llama's) drop the space of a text's first word.
        piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
        return f" {text.lstrip()}" if piece.startswith(METASPACE) else text
