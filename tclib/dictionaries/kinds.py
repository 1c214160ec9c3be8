"""The kinds of dictionaries and of their activations, by name."""

from __future__ import annotations

from typing import Literal

Kind = Literal["transcoder", "sae_mlp_out", "sae_mlp_in"]
Activation = Literal["relu", "topk", "batch_topk", "jumprelu"]
TAKES_K: tuple[Activation, ...] = ("topk", "batch_topk")
TAKES_THRESHOLD: tuple[Activation, ...] = ("batch_topk", "jumprelu")
