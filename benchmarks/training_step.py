"""A training step beside its five equal matrix products, and beside dense autograd with Adam.

A relu dictionary starts with half of its features active and ends with few; both steps are measured.
"""

from collections.abc import Callable
from unittest import mock

import torch
from result import Result, interleaved
from torch import Tensor, nn

from tclib.dictionaries.dictionary import DictionaryConfig, activate, new_dictionary
from tclib.training import gradients
from tclib.training.spec import DictionarySpec, TrainingConfig
from tclib.training.trainer import DictionaryTrainer

L1, LEARNING_RATE = 1e-3, 1e-4
Step = tuple[Callable[[], object], dict[str, Tensor]]  # and the weights that it changes


def run(small: bool) -> Result:
    """Seconds of a step over those of the five products, and what two steps do to the weights.

    Targets at 768 → 6144, batch 1024: relu + L1 at most 1.3 times the products, 0.6 once sparse (L0 100),
    topk (k = 32) 0.8; at the demo's size, sparse (L0 10 of 1,024) in half the time of dense.
    """
    d, batch, k = (64, 128, 8) if small else (768, 1024, 32)
    l0 = 10 if small else 100
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, batch, d, generator=generator)
    W_enc, W_dec = torch.randn(2, 8 * d, d, generator=generator) / d**0.5
    steps, agreements = [lambda: five_products(x, y, W_enc.T, W_dec)], {}
    for activation, own_k in (("relu", None), ("topk", k)):
        config = DictionaryConfig("transcoder", 0, d, d, 8 * d, activation, own_k)
        ours, theirs = tclib_step(config, x, y), autograd_step(config, x, y)
        agreements[f"two {activation} steps, autograd's"] = (apart(ours, theirs), 0.01)
        steps += [ours[0], theirs[0]]
    config = DictionaryConfig("transcoder", 0, d, d, 8 * d)
    sparse, dense = tclib_step(config, x, y, l0), tclib_step(config, x, y, l0, dense=True)
    agreements["two sparse relu steps, dense ones"] = (apart(sparse, dense), 0.01)
    steps.append(sparse[0])
    seconds, _ = interleaved(*steps, n_repeats=3 if small else 15, n_warmups=2)
    five, relu, dense_relu, topk, dense_topk, sparse_relu = seconds
    what = f"relu + L1 training step, {d} → {8 * d}, batch {batch}, over its five matrix products"
    measures = {
        what: (relu / five, ""),
        f"the same once it is sparse (L0 {l0}), over its five products": (sparse_relu / five, ""),
        "relu + L1 step of the demo, 128 → 1024, batch 512, one core, dense over sparse (L0 10), in time": (
            demo_ratio(3 if small else 100),
            "×",
        ),
        f"topk (k = {k}) step, over the same five products": (topk / five, ""),
        "dense autograd over the relu + L1 step, in time": (dense_relu / relu, "×"),
        "dense autograd over the topk step, in time": (dense_topk / topk, "×"),
    }
    return Result({"d_model": d, "batch": batch, "k": k}, measures, agreements)


def five_products(x: Tensor, y: Tensor, W_enc: Tensor, W_dec: Tensor) -> None:
    """Two forward, one back through the decoder, one for each weight's gradient."""
    z = x @ W_enc
    _ = z @ W_dec
    grad_z = y @ W_dec.T
    _ = z.T @ y
    _ = grad_z.T @ x


def demo_ratio(n_repeats: int) -> float:
    """The dense step's seconds over the sparse one's at the size of the demo's dictionaries."""
    x, y = torch.randn(2, 512, 128, generator=torch.Generator().manual_seed(0))
    config = DictionaryConfig("transcoder", 0, 128, 128, 1024)
    steps = [tclib_step(config, x, y, 10, dense=dense)[0] for dense in (True, False)]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as where dictionaries train side by side
    (dense, sparse), _ = interleaved(*steps, n_repeats=n_repeats, n_warmups=2)
    torch.set_num_threads(n_threads)
    return dense / sparse


def tclib_step(
    config: DictionaryConfig, x: Tensor, y: Tensor, l0: int | None = None, dense: bool = False
) -> Step:
    """Our step, from a start of the given L0 if there is one; `dense` as if no entries were few."""
    spec = DictionarySpec("transcoder", 0, config.activation, 8, L1, k=config.k)
    dictionary = new_dictionary(config, torch.Generator().manual_seed(0))
    if l0 is not None:
        pre = dictionary.pre_acts(x).flatten()
        dictionary.b_enc -= pre.topk(l0 * len(x), sorted=False).values.min()
    rate = {"learning_rate": LEARNING_RATE, "warmup_steps": 0}
    training = TrainingConfig(n_tokens=len(x), batch_size=len(x), **rate)
    trainer = DictionaryTrainer(spec, dictionary, training)
    block = {config.input_site: x, config.output_site: y}
    few = -1.0 if dense else gradients._FEW

    def step() -> None:
        with mock.patch.object(gradients, "_FEW", few), torch.no_grad():
            trainer.step(block, slice(0, len(x)), 0)

    return step, dictionary.parameters()


def autograd_step(config: DictionaryConfig, x: Tensor, y: Tensor) -> Step:
    """What one would write first: dense autograd, Adam, unit-norm decoder rows."""
    start = new_dictionary(config, torch.Generator().manual_seed(0)).parameters()
    p = {name: nn.Parameter(weights.clone()) for name, weights in start.items()}
    adam = torch.optim.Adam(p.values(), LEARNING_RATE)

    def step() -> None:
        z = activate(x @ p["W_enc"] + p["b_enc"], config.k)
        loss = (z @ p["W_dec"] + p["b_dec"] - y).pow(2).sum(1).mean() + L1 * z.sum(1).mean()
        adam.zero_grad()
        loss.backward()
        W_dec, gradient = p["W_dec"].data, p["W_dec"].grad
        gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec  # along the row
        adam.step()
        W_dec /= W_dec.norm(dim=1, keepdim=True)

    return step, {name: parameter.data for name, parameter in p.items()}


def apart(*steps: Step) -> float:
    """How the weights move in two steps, in norm: Adam may turn round a gradient of about zero."""
    moved = []
    for step, weights in steps:
        before = {name: one.clone() for name, one in weights.items()}
        step()
        step()
        moved.append(torch.cat([(weights[name] - before[name]).flatten() for name in before]))
    return float((moved[0] - moved[1]).norm() / moved[1].norm())
