"""One dictionary in training: its first weights, its Adam step, its state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig, activate
from tclib.dictionaries.kinds import TAKES_K
from tclib.evaluation import metrics
from tclib.training.activations import Block
from tclib.training.gradients import StepResult, step_result
from tclib.training.spec import DictionarySpec, TrainingConfig

THRESHOLD_RATE = 0.01  # a batch's share in batch_topk's running threshold


@dataclass(frozen=True)
class Measurement:
    """One line of the training log, for one dictionary."""

    loss: float
    l0: float
    fvu: float
    dead_share: float


class DictionaryTrainer:
    """One dictionary, its Adam state, and how long each feature has been silent."""

    def __init__(
        self, spec: DictionarySpec, dictionary: Dictionary, config: TrainingConfig
    ) -> None:
        self.spec = spec
        self.dictionary = dictionary
        self.config = config.of(spec)
        # Adam walks the memory of W_enc.T, which is the contiguous one.
        self._stored = {name: _contiguous(t) for name, t in dictionary.parameters().items()}
        self._adam = torch.optim.Adam(self._stored.values(), self.config.learning_rate, fused=True)
        self.tokens_since_fired = torch.zeros(
            dictionary.config.n_features, dtype=torch.int64, device=dictionary.b_enc.device
        )
        self._step_result = torch.compile(step_result) if config.compile else step_result

    def step(self, block: Block, rows: slice, step: int) -> StepResult:
        """Adam step number `step`, on a slice of the block, then unit-norm decoder rows."""
        x = block[self.dictionary.config.input_site][rows]
        y = block[self.dictionary.config.output_site][rows]
        dead = self.dead if self.spec.auxk_coefficient else None
        with self._precision():
            result = self._step_result(self.dictionary, x, y, self.spec, dead)
        self._remove_parallel_component(result.gradients)
        for name, gradient in result.gradients.items():
            parameter = self._stored[name]
            parameter.grad = _contiguous(gradient).to(parameter.dtype)
        self._adam.param_groups[0]["lr"] = self.config.learning_rate_at(step)
        self._adam.step()
        W_dec = self._stored["W_dec"]
        W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-12))
        self._keep_threshold(result)
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[result.fired] = 0
        return result

    @property
    def dead(self) -> Tensor:
        """Features that have been silent for `dead_after_tokens` or longer."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

    def measure(self, result: StepResult, block: Block, rows: slice) -> Measurement:
        """The log line of a step: its loss, L0 and FVU on its own batch, and the dead share."""
        y = block[self.dictionary.config.output_site][rows]
        return Measurement(
            loss=float(result.loss),
            l0=result.l0,
            fvu=float(result.squared_error / metrics.variation(y)),
            dead_share=float(self.dead.float().mean()),
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors = {"tokens_since_fired": self.tokens_since_fired}
        for name, parameter in self._stored.items():
            adam = {f"adam.{name}.{key}": v for key, v in self._adam.state[parameter].items()}
            tensors |= {f"parameter.{name}": parameter, **adam}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned, in place."""
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        for name, parameter in self._stored.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            prefix = f"adam.{name}."
            # Fused Adam wants its step count, too, where the parameter is.
            self._adam.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """While active, products are in the precision that the configuration asks for."""
        device, precision = self.dictionary.b_enc.device.type, self.config.precision
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        matmul.allow_tf32 = before or precision == "tf32"
        try:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                yield
        finally:
            matmul.allow_tf32 = before

    def _remove_parallel_component(self, gradients: dict[str, Tensor]) -> None:
        """Take out of each decoder row's gradient what would only change the row's norm."""
        gradient, W_dec = gradients["W_dec"], self._stored["W_dec"]
        along = torch.linalg.vecdot(gradient, W_dec.to(gradient.dtype)).unsqueeze(1)
        gradient.addcmul_(W_dec.to(gradient.dtype), along, value=-1.0)

    def _keep_threshold(self, result: StepResult) -> None:
        """jumprelu's thresholds stay at 0 or above; batch_topk's is a running mean of the batches'."""
        threshold = self.dictionary.threshold
        if result.threshold is not None and threshold is not None:
            is_first = not bool(threshold.any())
            threshold.lerp_(result.threshold, 1.0 if is_first else THRESHOLD_RATE)
        elif threshold is not None:
            threshold.clamp_(min=0.0)


def _contiguous(tensor: Tensor) -> Tensor:
    """`tensor`, or its transpose where that is the contiguous one."""
    return tensor if tensor.is_contiguous() else tensor.T


def scaled(dictionary: Dictionary, spec: DictionarySpec, block: Block, n_tokens: int) -> Dictionary:
    """The encoder times what gives the first reconstruction `initial_norm` times the output's norm.

    With outputs of norm 100 and the paper's start, features that are late to grow never win a place
    among the k largest: over half of them die.
    """
    config = dictionary.config
    x = block[config.input_site][:n_tokens].cpu()
    y = block[config.output_site][:n_tokens].cpu() - dictionary.b_dec
    pre = dictionary.pre_acts(x)
    z = activate(pre, config.k if config.activation in TAKES_K else None)
    wanted = spec.initial_norm * y.norm(dim=1).median()
    scale = float(wanted / (z @ dictionary.W_dec).norm(dim=1).median().clamp_min(1e-12))
    tensors = dictionary.parameters()
    scaled = {name: tensors[name] * scale for name in ("W_enc", "b_enc")}
    return Dictionary(config, **{**tensors, **scaled})


def init_generator(seed: int, config: DictionaryConfig) -> torch.Generator:
    """The initial weights depend on the seed, the kind and the layer, not on the company."""
    digest = hashlib.sha256(f"{seed} {config.kind} {config.layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
