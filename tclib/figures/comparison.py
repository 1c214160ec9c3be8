"""The figure of the interpretability comparison."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tclib.figures.style import BLUE, GREEN, VERMILION, styled


@styled
def proxy_figure(shares: pd.DataFrame) -> Figure:
    """Share of interpretable features by the proxy's threshold, with intervals, and of context-free ones."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.8))
    styles = {"transcoder": (BLUE, "o", -0.006), "sae_mlp_out": (VERMILION, "s", 0.006)}
    titles = {"interpretable": "interpretable", "context_free": "interpretable and context-free"}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for kind, own in shares.groupby("kind"):
            colour, marker, shift = styles.get(str(kind), (GREEN, "^", 0.0))
            x = own["threshold"] + shift
            axis.plot(x, own[column], color=colour, marker=marker, label=str(kind))
            if column == "interpretable":
                errors = np.abs(own[["low", "high"]].to_numpy().T - own[column].to_numpy())
                axis.errorbar(x, own[column], errors, fmt="none", ecolor=colour, capsize=3)
        axis.set(xlabel="Threshold on F1 (0.6 is used)", ylabel="Share of the features drawn")
        axis.set(title=title, ylim=(0, 1))
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    return figure
