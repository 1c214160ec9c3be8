"""Train transcoders, attribute circuits through them, study their features.

    import tclib as tc

The names below are loaded when they are first used, so that `import tclib` is quick and imports no torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tclib.blind.ledger import Position as Position
    from tclib.blind.ledger import load_ledger as load_ledger
    from tclib.blind.replay import replay as replay
    from tclib.blind.session import BlindSession as BlindSession
    from tclib.circuits.frozen import FrozenPrompts as FrozenPrompts
    from tclib.circuits.graph import AttributionGraph as AttributionGraph
    from tclib.circuits.graph import attribution_graph as attribution_graph
    from tclib.circuits.paths import Node as Node
    from tclib.circuits.paths import greedy_paths as greedy_paths
    from tclib.circuits.paths import path_table as path_table
    from tclib.circuits.paths import paths_to_graph as paths_to_graph
    from tclib.circuits.paths import step_back as step_back
    from tclib.circuits.prune import graph_scores as graph_scores
    from tclib.circuits.prune import prune as prune
    from tclib.circuits.prune import prune_to_size as prune_to_size
    from tclib.circuits.prune import sum_over_tokens as sum_over_tokens
    from tclib.circuits.prune import supernodes as supernodes
    from tclib.circuits.sources import sources as sources
    from tclib.dictionaries.bases import to_processed as to_processed
    from tclib.dictionaries.dictionary import Dictionary as Dictionary
    from tclib.dictionaries.dictionary import DictionaryConfig as DictionaryConfig
    from tclib.dictionaries.formats.any import load_dictionary as load_dictionary
    from tclib.dictionaries.published import load_published as load_published
    from tclib.evaluation.evaluate import evaluate as evaluate
    from tclib.evaluation.replace import replace_mlp as replace_mlp
    from tclib.features.from_weights import Head as Head
    from tclib.features.from_weights import de_embedding as de_embedding
    from tclib.features.from_weights import direct_logit_attribution as direct_logit_attribution
    from tclib.features.from_weights import extended_de_embedding as extended_de_embedding
    from tclib.features.from_weights import ov_norms as ov_norms
    from tclib.features.from_weights import pullback as pullback
    from tclib.features.from_weights import token_table as token_table
    from tclib.greater_than.task import GreaterThan as GreaterThan
    from tclib.models.language_model import LanguageModel as LanguageModel
    from tclib.models.running import Site as Site
    from tclib.replication.run import Run as Run
    from tclib.replication.run import open_run as open_run
    from tclib.support.errors import InputError as InputError
    from tclib.text.corpus import Corpus as Corpus
    from tclib.text.corpus import CorpusConfig as CorpusConfig
    from tclib.text.corpus import build_corpus as build_corpus
    from tclib.training.spec import DictionarySpec as DictionarySpec
    from tclib.training.spec import TrainingConfig as TrainingConfig
    from tclib.training.train import train as train

# The block above is the one list of public names: type checkers read it, and so does this.
_TREE = ast.parse(Path(__file__).read_text(encoding="utf-8"))
_HOME_OF = {
    alias.name: str(node.module)
    for node in ast.walk(_TREE)
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tclib.")
    for alias in node.names
}

__version__ = importlib.metadata.version("tclib")
__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        near = difflib.get_close_matches(name, __all__)
        advice = f"did you mean {', '.join(near)}?" if near else "dir(tclib) lists what it has"
        raise AttributeError(f"module 'tclib' has no attribute {name!r}: {advice}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
