"""What a prompt is made of, exactly: frozen prompts, sources, paths, attribution graphs, interventions.

Where each equation and algorithm of the paper stands is `EQUATIONS`.
"""

EQUATIONS = {
    "Eq. 3: z = act(x W_enc + b_enc)": "tclib.dictionaries.dictionary.Dictionary.encode",
    "Eq. 4: ŷ = z W_dec + b_dec": "tclib.dictionaries.dictionary.Dictionary.decode",
    "Eq. 5: the loss, and its gradients": "tclib.training.gradients.step_result",
    "Eq. 7: z times (d · f), over a whole target": "tclib.circuits.sources.sources",
    "Eq. 7: its input-invariant factor, W_dec f": "tclib.features.from_weights.pullback",
    "Eq. 8: through a head, A[t, s] x W_V W_O f": "tclib.circuits.sources.sources",
    "Eqs. 22 to 28: one step further back": "tclib.circuits.paths.step_back",
    "Eqs. 25, 26: a target is a finite sum": "tclib.circuits.sources.sources",
    "Algorithm 1: greedy paths": "tclib.circuits.paths.greedy_paths",
    "Algorithm 2: paths to a graph": "tclib.circuits.paths.paths_to_graph",
    "Section 4.1: de-embedding": "tclib.features.from_weights.de_embedding",
    "Section 4.2: cross-entropy with the MLP replaced": "tclib.evaluation.evaluate.evaluate",
    "Section 5.2: the probability difference": "tclib.greater_than.task.mean_probability_difference",
    "Figure 4: attribution and de-embedding over years": (
        "tclib.greater_than.feature_curves.feature_curves"
    ),
    "Figure 5: zero ablation of all but k": "tclib.greater_than.curves.ablation_curve",
    "Figure 5: the feature that hurts": "tclib.greater_than.harm.harmful_units",
}
