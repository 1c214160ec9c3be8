"""Overriding parts of a model while it runs: what an MLP, its input, its neurons or the heads put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from tclib.models.weights import ProcessedWeights

MlpOverride = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def attached(*hooks: tuple[Callable[[Any], Any], Any]) -> Iterator[None]:
    """While active, hooks are on, each a pair (how to register it, hook); afterwards they are off."""
    handles: list[Any] = []
    try:
        for register, hook in hooks:
            handles.append(register(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forwarding(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While active, `module` is not run: `forward` is called in its place."""
    # An attribute of the module itself hides the method of its class.
    hidden = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if hidden is not None:
            module.forward = hidden


class Overrides(ProcessedWeights):
    """Context managers that change what a part puts out, and put everything back afterwards."""

    def override_mlp(self, layer: int, override: MlpOverride) -> AbstractContextManager[None]:
        """While active, the MLP of `layer` returns `override(mlp_in, mlp_out)`.

        Both arguments and the result are in the processed basis, [batch, pos, d_model].
        """
        block = self._block(self.check_layer(layer))
        norm = self.mlp_norm(layer)
        mlp_in: list[Tensor] = []

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mlp_in[:] = [norm.normalise(inputs[0])]

        def after(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return override(mlp_in.pop(), norm.centre(output)).to(output.dtype)

        return attached(
            (block.mlp_norm.register_forward_pre_hook, before),
            (block.mlp.register_forward_hook, after),
        )

    @contextmanager
    def stand_in_for_mlp(self, layer: int, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While active, the MLP of `layer` is not run: `stand_in(mlp_in)` is what it returns.

        As `override_mlp`, for what has no use for mlp_out; the MLP is most of a block's work.
        """
        block = self._block(self.check_layer(layer))
        norm = self.mlp_norm(layer)
        mlp_in: list[Tensor] = []

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mlp_in[:] = [norm.normalise(inputs[0])]

        def forward(x: Tensor) -> Tensor:
            return stand_in(mlp_in.pop()).to(x.dtype)

        with (
            forwarding(block.mlp, forward),
            attached((block.mlp_norm.register_forward_pre_hook, before)),
        ):
            yield

    def override_heads(
        self, layer: int, override: Callable[[Tensor], Tensor]
    ) -> AbstractContextManager[None]:
        """While active, the heads of `layer` put out `override(z)`, z of shape [batch, pos, head, d_head].

        z is each head's weighted mean of values, before W_O.
        """
        attention = self._block(self.check_layer(layer)).attention

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            z = inputs[0].unflatten(-1, (self.n_heads, -1))
            return (override(z).flatten(-2).to(inputs[0]),)

        projection = getattr(attention, self._architecture.heads_out)
        return attached((projection.register_forward_pre_hook, before))

    def override_neurons(
        self, layer: int, override: Callable[[Tensor], Tensor]
    ) -> AbstractContextManager[None]:
        """While active, the neurons of the MLP of `layer` put out `override(acts)`, [batch, pos, neuron]."""
        mlp = self._block(self.check_layer(layer)).mlp

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (override(inputs[0]),)

        projection = getattr(mlp, self._architecture.neurons_out)
        return attached((projection.register_forward_pre_hook, before))

    def override_mlp_input(
        self, layer: int, override: Callable[[Tensor], Tensor]
    ) -> AbstractContextManager[None]:
        """While active, the MLP of `layer` runs on `override(mlp_in)` instead of mlp_in.

        The norm's gain and bias are applied behind the override, as the model does.
        """
        block = self._block(self.check_layer(layer))
        norm = self.mlp_norm(layer)

        def after(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return norm.affine(override(norm.normalise(inputs[0]))).to(output.dtype)

        return attached((block.mlp_norm.register_forward_hook, after))
