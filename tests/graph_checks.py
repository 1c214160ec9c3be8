"""What must hold of every graph, whatever its model is and its transcoders read."""

from __future__ import annotations

import numpy as np

from tclib.circuits.derivatives import predicted_changes, root_gradients
from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.graph import attribution_graph, total_effects
from tclib.circuits.interventions import ablated_values

SMALL = 1e-3  # of a feature: softmax is computed in float32, whatever the model's type


def check_totals_and_ablations(frozen: FrozenPrompts, root: Target) -> None:
    """Total effects on a root of prompt 1 are gradients, and small ablations do what the model's gradients say."""
    graph = attribution_graph(frozen, [root], prompt=1)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    own = predicted_changes(frozen, features, root_gradients(frozen, root, "frozen norms"))
    totals = total_effects(graph)[features.index]
    np.testing.assert_allclose(own, -totals, rtol=1e-7, atol=1e-10)
    some = features.sample(12, random_state=0)
    predicted = predicted_changes(frozen, some, root_gradients(frozen, root, "everything"))
    before, after = (
        ablated_values(frozen, some.assign(activation=share * some["activation"]), root)
        for share in (0.0, SMALL)
    )
    np.testing.assert_allclose((after - before) / SMALL, predicted, rtol=5e-2, atol=3e-3)
