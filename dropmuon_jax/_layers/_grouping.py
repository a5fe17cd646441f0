"""Where to cut an order of layers into groups of similar cost."""

from collections.abc import Sequence

import numpy as np


def balanced_cuts(costs: Sequence[float], num_groups: int) -> list[int]:
    """Where each group starts, so that the sum of the squared costs of the groups is smallest."""
    num_layers = len(costs)
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])
    # best[g][j]: the smallest sum with the first j layers in g groups; start[g][j]: where g starts.
    best = np.full((num_groups + 1, num_layers + 1), np.inf)
    start = np.zeros((num_groups + 1, num_layers + 1), dtype=int)
    best[0, 0] = 0.0
    for g in range(1, num_groups + 1):
        for j in range(g, num_layers + 1):
            candidates = best[g - 1, :j] + (prefix[j] - prefix[:j]) ** 2
            start[g, j] = np.argmin(candidates)
            best[g, j] = candidates[start[g, j]]
    cuts, stop = [], num_layers
    for g in range(num_groups, 0, -1):
        stop = int(start[g, stop])
        cuts.append(stop)
    return cuts[::-1]
