"""A frozen language model behind one object: tokens, forward passes, weights in the processed basis.

Together with `architectures` and `locate` the only modules that know transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from tclib.models.locate import first_line, locate, quiet_transformers
from tclib.models.running import Running
from tclib.support.errors import InputError


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LanguageModel(Running):
    """A frozen transformers model with named MLP sites and processed weights.

    Args:
        model: a transformers model of a known class (`architectures.ARCHITECTURES`).
        tokenizer: its fast tokenizer.
        name: how messages and manifests call it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "model") -> None:
        super().__init__(model, name)
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls, name: str, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> LanguageModel:
        """Load `demo`, `demo-neox`, `smollm2`, a local Hugging Face folder or a hub id.

        Errors: `InputError` if the model is nowhere to be had, or of an unsupported geometry.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        location = locate(name)
        quiet_transformers()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(location)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"model {name!r} could not be read from {location} ({first_line(error)}): "
                "is the folder a complete Hugging Face model?"
            ) from error
        return cls(model.to(device or default_device()), tokenizer, name)

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
            "norm": {"layer": "LayerNorm", "rms": "RMSNorm"}[self.norm_kind],
            "positions": "learned" if self._architecture.position_embedding else "rotary",
        }

    @property
    def bos_id(self) -> int:
        """The token that opens every row: the tokenizer's BOS, else its EOS."""
        token_id = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if token_id is None else token_id)

    def check_context(self, n_ctx: int) -> int:
        """`n_ctx`, if the model's context is that long; else `InputError`."""
        if not 2 <= n_ctx <= self.n_ctx:
            raise InputError(
                f"context of {n_ctx} tokens: {self.name} takes 2 to {self.n_ctx}; set n_ctx accordingly"
            )
        return n_ctx

    def tokenize(self, text: str) -> Int[Tensor, "1 pos"]:
        """Token ids of `text` with BOS in front.

        Errors: `InputError` for a text with words outside a closed vocabulary, or longer than
        the context.
        """
        ids = [self.bos_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
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
        """The text of each token by itself."""
        return [self.tokenizer.decode([int(i)]) for i in ids]
