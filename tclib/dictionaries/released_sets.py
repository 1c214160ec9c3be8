"""The one table of released sets of transcoders: where each lies, what it is of, how its files are called."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from tclib.support.errors import InputError

GPT2_FILE = "final_sparse_autoencoder_gpt2-small_blocks.{layer}.ln2.hook_normalized_24576.pt"
GPT2_FREQUENCIES = GPT2_FILE.replace(".pt", "_log_feature_sparsity.pt")


@dataclass(frozen=True)
class ReleasedSet:
    """A released set: a transcoder for each layer of a model.

    Args:
        name: how it is asked for.
        repository: its id on the hub.
        model: the model that it is of, on the hub.
        n_layers: how many layers that has.
        n_features: width; 0 where only its files say.
        activation: how it is kept sparse.
        reads: the hook of TransformerLens that it reads; "config" where its configuration says.
        licence: of the weights.
        gigabytes: on disk, all layers; 0 where it is not known.
        format: which reader.
        file: of a layer, with {layer}, {variant} and {l0}.
        besides: files that the reader needs too.
        optional: files that are fetched with it.
        variants: which there are; the first is the default.
        l0: mean active features a token, as released: of each layer, or of the middle one; none: not said.
        k: of a top-k set whose files do not say it.
    """

    name: str
    repository: str
    model: str
    n_layers: int
    activation: str
    n_features: int = 0
    reads: str = "config"
    licence: str = "not stated"
    gigabytes: float = 0.0
    format: str = "circuit-tracer"
    file: str = "layer_{layer}.safetensors"
    besides: tuple[str, ...] = ("config.yaml",)
    optional: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("",)
    l0: tuple[int, ...] = ()
    k: int | None = None

    @property
    def middle(self) -> int:
        """The layer by which a set is checked."""
        return self.n_layers // 2

    def l0_of(self, layer: int) -> int | None:
        """The released L0 of a layer, where one is known."""
        if len(self.l0) == self.n_layers:
            return self.l0[layer]
        return self.l0[0] if self.l0 and layer == self.middle else None

    def names(self, layer: int, variant: str, patterns: Iterable[str]) -> list[str]:
        """Files of a layer in the repository."""
        l0 = self.l0_of(layer)
        return [pattern.format(layer=layer, variant=variant, l0=l0) for pattern in patterns]


# Means over text that came with the weights, in the folders' names: the lowest of each layer.
_GEMMA_2_L0 = (
    *(76, 65, 49, 54, 88, 87, 95, 70, 52, 72, 88, 5, 6),
    *(8, 8, 8, 10, 12, 13, 12, 11, 13, 15, 25, 37, 41),
)
_GEMMA_3 = {  # size: layers, gigabytes of the narrow ones
    "270m": (18, 1.5),
    "1b": (26, 3.9),
    "4b": (34, 11.4),
    "12b": (48, 24.2),
    "27b": (62, 43.7),
}
_GEMMA_3_VARIANTS = tuple(
    f"width_{width}_l0_{size}{affine}"
    for width in ("16k", "262k")
    for size in ("small", "big")
    for affine in ("", "_affine")
)
_QWEN_3 = {  # size: layers, and the ending of the set that its author recommends
    "0.6b": (28, "-lowl0"),
    "1.7b": (28, "-lowl0"),
    "4b": (36, ""),
    "8b": (36, ""),
    "14b": (40, "-lowl0"),
}


def _gemma_3(size: str, kind: str) -> ReleasedSet:
    n_layers, gigabytes = _GEMMA_3[size]
    # The smallest base model has no -pt in its name.
    ending = "" if (size, kind) == ("270m", "pt") else f"-{kind}"
    return ReleasedSet(
        name=f"gemma-scope-2-{size}-{kind}",
        repository=f"google/gemma-scope-2-{size}-{kind}",
        model=f"google/gemma-3-{size}{ending}",
        n_layers=n_layers,
        n_features=16_384,
        activation="jumprelu",
        reads="mlp.hook_in",
        licence="CC-BY-4.0",
        gigabytes=gigabytes,
        format="gemma-scope",
        file="transcoder_all/layer_{layer}_{variant}/params.safetensors",
        besides=(),
        variants=_GEMMA_3_VARIANTS,
        l0=(20,),
    )


def _qwen_3(size: str) -> ReleasedSet:
    n_layers, ending = _QWEN_3[size]
    return ReleasedSet(
        name=f"qwen3-{size}",
        repository=f"mwhanna/qwen3-{size}-transcoders{ending}",
        model=f"Qwen/Qwen3-{size.upper()}",
        n_layers=n_layers,
        activation="relu",
        reads="mlp.hook_in",
        licence="MIT",
    )


_ALL = (
    ReleasedSet(
        name="gpt2",
        repository="pchlenski/gpt2-transcoders",
        model="openai-community/gpt2",
        n_layers=12,
        n_features=24_576,
        activation="relu",
        reads="ln2.hook_normalized",
        gigabytes=1.8,
        format="authors",
        file=GPT2_FILE,
        besides=(),
        optional=(GPT2_FREQUENCIES,),
    ),
    ReleasedSet(
        name="gemma-scope-2b",
        repository="google/gemma-scope-2b-pt-transcoders",
        model="google/gemma-2-2b",
        n_layers=26,
        n_features=16_384,
        activation="jumprelu",
        reads="ln2.hook_normalized",
        licence="CC-BY-4.0",
        gigabytes=7.9,
        format="gemma-scope",
        file="layer_{layer}/width_16k/average_l0_{l0}/params.npz",
        besides=(),
        l0=_GEMMA_2_L0,
    ),
    *(_gemma_3(size, kind) for size in _GEMMA_3 for kind in ("pt", "it")),
    ReleasedSet(
        name="llama-3.2-1b",
        repository="mntss/transcoder-Llama-3.2-1B",
        model="meta-llama/Llama-3.2-1B",
        n_layers=16,
        n_features=131_072,
        activation="relu",
        licence="MIT",
        gigabytes=17.3,
    ),
    ReleasedSet(
        name="llama-3.1-8b-instruct",
        repository="facebook/crv-8b-instruct-transcoders",
        model="meta-llama/Llama-3.1-8B-Instruct",
        n_layers=32,
        activation="topk",
        reads="mlp.hook_in",
        licence="CC-BY-NC-4.0",
        l0=(128,),
        k=128,  # as circuit-tracer has it: the set does not say
    ),
    *(_qwen_3(size) for size in _QWEN_3),
    ReleasedSet(
        name="smollm2-135m-skip",
        repository="EleutherAI/skip-transcoder-SmolLM2-135M-128x",
        model="HuggingFaceTB/SmolLM2-135M",
        n_layers=30,
        n_features=73_728,
        activation="topk",
        reads="mlp.hook_in",
        licence="Apache-2.0",
        gigabytes=10.2,
        format="sparsify",
        file="model.layers.{layer}.mlp/sae.safetensors",
        besides=("model.layers.{layer}.mlp/cfg.json",),
    ),
    ReleasedSet(
        name="llama-3.2-1b-skip",
        repository="EleutherAI/skip-transcoder-Llama-3.2-1B-131k",
        model="meta-llama/Llama-3.2-1B",
        n_layers=16,
        n_features=131_072,
        activation="topk",
        reads="mlp.hook_in",
        gigabytes=34.6,
        format="sparsify",
        file="layers.{layer}.mlp/sae.safetensors",
        besides=("layers.{layer}.mlp/cfg.json",),
    ),
    ReleasedSet(
        name="llama-scope-8x",
        repository="fnlp/Llama3_1-8B-Base-LXTC-8x",
        model="meta-llama/Llama-3.1-8B",
        n_layers=32,
        n_features=32_768,
        activation="jumprelu",
        licence="Apache-2.0",
        format="llama-scope",
        file="Llama3_1-8B-Base-L{layer}TC-8x/checkpoints/final.safetensors",
        besides=("Llama3_1-8B-Base-L{layer}TC-8x/hyperparams.json",),
    ),
)
SETS = {one.name: one for one in _ALL}


def released_set(name: str) -> ReleasedSet:
    """The set of a name. Errors: `InputError` that names those that are near."""
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS) or list(SETS)
        raise InputError(
            f"released set {name!r}: `tclib published` lists them all; {', '.join(near[:6])}"
        )
    return SETS[name]
