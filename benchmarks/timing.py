"""Ratios of times in one run: variants take turns, so that load hits all alike."""

import time
from typing import NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """Median of the ratios over the rounds, their quartiles, and best over best."""

    median: float
    low: float
    high: float
    best: float

    def __str__(self):
        return f"{self.median:.2f}"


def ratios(variants, baseline, rounds, inner=1):
    """Name -> Ratio to the baseline, for functions without arguments.

    Args:
        variants: Name -> function; each has run often enough to be compiled.
        baseline: The name whose time is 1.
        rounds: How often all take their turn.
        inner: Calls per turn, for functions of microseconds.
    """
    times = {name: [] for name in variants}
    turns = list(variants.items())
    random = np.random.default_rng(0)
    for _ in range(rounds):
        # None always runs after the same other, with the caches that one leaves.
        random.shuffle(turns)
        for name, run in turns:
            start = time.perf_counter()
            for _ in range(inner):
                run()
            times[name].append(time.perf_counter() - start)
    base = np.array(times[baseline])
    result = {}
    for name, taken in times.items():
        each = np.array(taken) / base
        low, median, high = np.percentile(each, [25, 50, 75])
        best = min(taken) / min(times[baseline])
        result[name] = Ratio(float(median), float(low), float(high), float(best))
    return result
