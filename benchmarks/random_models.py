"""Random GPT-2s and transcoders for them: GPT-2 small's geometry, and one that takes no time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.models.language_model import LanguageModel
from tclib.text.world import build_tokenizer


@dataclass(frozen=True)
class Geometry:
    """A model's and its transcoders' widths; about `l0` features are active a token."""

    n_layers: int
    d_model: int
    n_heads: int
    n_features: int
    l0: int
    d_vocab: int = 893  # of the bundled tokenizer, which all these models have

    def config(self, n_ctx: int) -> GPT2Config:
        sizes = {"n_embd": self.d_model, "n_layer": self.n_layers, "n_head": self.n_heads}
        special = {"bos_token_id": 0, "eos_token_id": 0}
        return GPT2Config(vocab_size=self.d_vocab, n_positions=n_ctx, **sizes, **special)

    def lm(self, n_ctx: int) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(GPT2LMHeadModel(self.config(n_ctx)), build_tokenizer(), "random")

    def rows(self, n_rows: int, n_pos: int) -> Tensor:
        """Random tokens behind a BOS."""
        rows = torch.randint(2, self.d_vocab, (n_rows, n_pos), dtype=torch.int32)
        rows[:, 0] = 0
        return rows

    def transcoder(self, layer: int, mlp_in: Tensor) -> Dictionary:
        """Random directions, with the bias at the quantile that leaves `l0` features active a token."""
        n, d = self.n_features, self.d_model
        W_enc = torch.randn(n, d).T / d**0.5
        W_dec = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
        pre_acts = (mlp_in[:64] @ W_enc).flatten()[:1_000_000]
        b_enc = -torch.quantile(pre_acts, 1 - self.l0 / n).expand(n).clone()
        config = DictionaryConfig("transcoder", layer, d, d, n)
        return Dictionary(config, W_enc, b_enc, W_dec, torch.zeros(d))

    def transcoders(self, lm: LanguageModel, tokens: Tensor) -> list[Dictionary]:
        """One a layer."""
        mlp_in = lm.cache(tokens).mlp_in
        return [self.transcoder(layer, mlp_in[layer][0]) for layer in range(self.n_layers)]


GPT2_SMALL = Geometry(12, 768, 12, 24_576, 100, 50_257)
SMALL = Geometry(3, 64, 4, 512, 20)
