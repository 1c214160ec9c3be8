"""Interleaved repetitions and their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved_medians(
    candidates: dict[str, Callable[[], object]], n_repeats: int, n_warmups: int = 2
) -> dict[str, float]:
    """Median seconds of each candidate, run in turn so that a slow spell hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(n_warmups + n_repeats):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if repeat >= n_warmups:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_ratios(medians: dict[str, float], floor: str) -> None:
    for name, seconds in medians.items():
        print(f"{name:42} {1000 * seconds:9.1f} ms   {seconds / medians[floor]:6.3f} × {floor}")
