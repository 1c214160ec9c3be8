"""What a benchmark hands over: figures for the README's table, and how far its two ways agree."""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class NotHere(Exception):
    """What a benchmark needs is not on this machine."""


@dataclass(frozen=True)
class Result:
    """One benchmark's findings.

    Args:
        sizes: of the problem.
        measures: a line of the README's table each: value and unit, × for a ratio of times.
        agreements: what was compared: the difference found, and the largest allowed at any size.
    """

    sizes: dict[str, int]
    measures: dict[str, tuple[float, str]]
    agreements: dict[str, tuple[float, float]]


def interleaved(
    *candidates: Callable[[], Any], n_repeats: int, n_warmups: int = 0
) -> tuple[list[float], list[Any]]:
    """Median seconds of each, run in turn so that a slow spell hits all of them; what each returned."""
    seconds: list[list[float]] = [[] for _ in candidates]
    returned: list[Any] = [None] * len(candidates)
    for _ in range(n_warmups + n_repeats):
        for i, candidate in enumerate(candidates):
            began = time.perf_counter()
            returned[i] = candidate()
            seconds[i].append(time.perf_counter() - began)
    return [statistics.median(one[n_warmups:]) for one in seconds], returned


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest of two tensors' entries, over the largest that was expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def peak_gib() -> float:
    """Peak memory of this process so far."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns there; its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
