"""The bundled language models: how they were trained on the world, and how they are measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tclib.evaluation import metrics
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.text.grammar import Document
from tclib.text.packing import pack
from tclib.text.world import BOS, build_tokenizer, documents, held_out_pairs, surprisal_bound


@dataclass(frozen=True)
class ModelTraining:
    """How a bundled model is trained (defaults: exactly how the committed ones were)."""

    architecture: str = "gpt2"  # "gpt2" or "neox"
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_ctx: int = 128
    n_steps: int = 2400
    rows_per_step: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    seed: int = 1


def _new_model(config: ModelTraining, d_vocab: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": d_vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.n_ctx,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if config.architecture == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**(shape | no_dropout)))
    if config.architecture == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=4 * config.d_model))
    raise InputError(f"architecture {config.architecture!r}: expected 'gpt2' or 'neox'")


def _learning_rate_share(step: int, config: ModelTraining) -> float:
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return warmup * 0.5 * (1.0 + math.cos(math.pi * step / config.n_steps))


def train_model(config: ModelTraining, folder: Path) -> dict[str, float]:
    """Train one bundled model and write it, its tokenizer and its card to `folder`.

    The weights are stored as float16; the losses in the card are those of the rounded weights.
    """
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    model = _new_model(config, len(ids))
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: _learning_rate_share(s, config)
    )
    encoded = ([ids[token] for token in document.tokens] for document in documents(config.seed))
    n_rows = config.n_steps * config.rows_per_step
    rows = torch.from_numpy(pack(encoded, config.n_ctx, ids[BOS], n_rows)).long()
    bar = progress(rows.split(config.rows_per_step), f"demo {config.architecture}")
    for batch in bar:
        loss = metrics.next_token_losses(model(batch, use_cache=False).logits, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pairs = held_out_pairs(config.n_ctx)
    card = {
        "held_out_loss_nats": held_out_loss(model.float(), pairs, ids),
        "derivation_bound_nats": surprisal_bound([second for _, second in pairs]),
        "n_training_tokens": config.n_steps * config.rows_per_step * config.n_ctx,
    }
    text = json.dumps({"training": asdict(config), **card}, indent=2)
    (folder / "card.json").write_text(text + "\n")
    return card


@torch.no_grad()
def held_out_loss(
    model: Any, pairs: Sequence[tuple[Document, Document]], ids: dict[str, int]
) -> float:
    """Mean loss in nats a predicted token over the second document of each pair.

    The first document only stands in front: in packed rows a model sees the BOS at position 0 mostly
    before the middle of a document, so a document's beginning is learned behind another BOS.
    Directly comparable with `surprisal_bound` of the second documents.
    """
    nats, n_predicted = 0.0, 0
    for start in range(0, len(pairs), 100):
        batch = pairs[start : start + 100]
        rows = [[BOS, *a.tokens, BOS, *b.tokens, BOS] for a, b in batch]
        width = max(map(len, rows))
        tokens = torch.tensor([[ids[t] for t in row + [BOS] * (width - len(row))] for row in rows])
        losses = metrics.next_token_losses(model(tokens, use_cache=False).logits, tokens)
        first = torch.tensor([len(a.tokens) + 1 for a, _ in batch])[:, None]
        last = torch.tensor([len(row) - 1 for row in rows])[:, None]
        position = torch.arange(width - 1)[None]
        counted = (position >= first) & (position < last)
        nats += float(losses[counted].double().sum())
        n_predicted += int(counted.sum())
    return nats / n_predicted
