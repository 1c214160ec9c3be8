"""Overriding parts of a model while it runs: what an MLP, its input, its neurons or the heads put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from tclib.models.architectures import Block, Norm, without_extras
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


def mlp_entry(block: Block) -> nn.Module:
    """The module that takes in the stream which an MLP reads: its norm, or else the MLP."""
    return block.mlp_reader if block.mlp_norm is None else block.mlp_norm


def in_rows(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Activations by row and position, of a family that makes one list of all positions (OPT)."""
    return value.view(*shape, -1) if value.ndim == 2 else value


class _Passing:
    """What one pass through a block shares between hooks: how many rows and positions, and what its MLP reads."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.mlp_in: list[Tensor] = []

    def note_shape(self, _block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.shape = tuple(inputs[0].shape[:2])

    def given(self, value: Tensor) -> Tensor:
        return in_rows(value, self.shape)


def put_out(made: Tensor, output: Any) -> Any:
    """`made` in the shape and type in which a module puts out what is added to the stream."""
    raw = without_extras(output)
    made = made.to(raw.dtype).view(raw.shape) if raw.ndim == 2 else made.to(raw.dtype)
    return (made, *output[1:]) if isinstance(output, tuple) else made


class Overrides(ProcessedWeights):
    """Context managers that change what a part puts out, and put everything back afterwards."""

    def _added(self, raw: Tensor) -> Tensor:
        """What an MLP adds to the stream, of what its module puts out: times the family's multiplier, centred."""
        factor = self._multipliers.added
        return self.final_norm.centre(raw if factor == 1 else raw * factor)

    def _before_added(self, mlp_out: Tensor) -> Tensor:
        """What a module must put out for `mlp_out` to be added."""
        factor = self._multipliers.added
        given = mlp_out if factor == 1 else mlp_out / factor
        return given.clone() if self._architecture.adds_in_place else given

    def _noting(
        self, layer: int, passing: _Passing, norm: Norm | None = None
    ) -> list[tuple[Callable[[Any], Any], Any]]:
        """Hooks that note the shape of a pass and its mlp_in, or what another norm than its own makes of the stream."""
        norm = self.mlp_norm(layer) if norm is None else norm

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            passing.mlp_in[:] = [norm.normalise(passing.given(inputs[0]))]

        return [
            (self._blocks[layer].register_forward_pre_hook, passing.note_shape),
            (mlp_entry(self._block(layer)).register_forward_pre_hook, before),
        ]

    def override_mlp(self, layer: int, override: MlpOverride) -> AbstractContextManager[None]:
        """While active, the MLP of `layer` returns `override(mlp_in, mlp_out)`.

        Both arguments and the result are in the processed basis, [batch, pos, d_model].
        """
        writer, passing = self._block(self.check_layer(layer)).mlp_writer, _Passing()

        def after(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> Any:
            mlp_out = self._added(passing.given(without_extras(output)))
            made = override(passing.mlp_in.pop(), mlp_out).expand_as(mlp_out)
            return put_out(self._before_added(made), output)

        return attached(*self._noting(layer, passing), (writer.register_forward_hook, after))

    @contextmanager
    def stand_in_for_mlp(
        self, layer: int, stand_in: Callable[[Tensor], Tensor], reads_stream: bool = False
    ) -> Iterator[None]:
        """While active, the MLP of `layer` is not run: `stand_in(mlp_in)` is what it returns.

        As `override_mlp`, for what has no use for mlp_out; the MLP is most of a block's work. With `reads_stream` it
        is given resid_mid.
        """
        block, passing = self._block(self.check_layer(layer)), _Passing()
        skippable = self._architecture.skippable

        def forward(x: Tensor) -> Any:
            mlp_in = passing.mlp_in.pop()
            made = self._before_added(stand_in(mlp_in).expand_as(mlp_in)).to(x.dtype)
            if self._architecture.gives_scores:
                return made, None
            return made.flatten(0, 1) if x.ndim == 2 else made

        with ExitStack() as stack:
            stack.enter_context(forwarding(block.mlp_writer, forward))
            if skippable is not None:
                part = self._blocks[layer].get_submodule(skippable)
                stack.enter_context(forwarding(part, lambda x: x))
            norm = self.no_norm if reads_stream else None
            stack.enter_context(attached(*self._noting(layer, passing, norm)))
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
        """While active, the neurons of the MLP of `layer` put out `override(acts)`, [batch, pos, neuron].

        Errors: `InputError` for an MLP of experts.
        """
        projection, passing = self._neurons_out(layer), _Passing()

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (put_out(override(passing.given(inputs[0])), inputs[0]),)

        return attached(
            (self._blocks[layer].register_forward_pre_hook, passing.note_shape),
            (projection.register_forward_pre_hook, before),
        )

    def override_mlp_input(
        self, layer: int, override: Callable[[Tensor], Tensor]
    ) -> AbstractContextManager[None]:
        """While active, the MLP of `layer` runs on `override(mlp_in)` instead of mlp_in.

        The norm's gain and bias are applied behind the override, as the model does; what else reads through the same
        norm (the attention of Phi) does not see it.
        """
        reader, passing = self._block(self.check_layer(layer)).mlp_reader, _Passing()
        norm = self.mlp_norm(layer)

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            read = norm.affine(override(passing.mlp_in.pop()))
            return (put_out(read, inputs[0]), *inputs[1:])

        return attached(*self._noting(layer, passing), (reader.register_forward_pre_hook, before))
