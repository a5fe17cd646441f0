"""Which device owns which matrix, so that all have the same work."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int


class Owners:
    """Shares out buckets of matrices, one after another, to the devices with the least so far.

    As the longest-processing-time rule of scheduling, if those of the largest matrices come first.
    """

    def __init__(self, axes: Mapping[str, int]):
        self._names = list(axes)
        self._work = np.zeros(tuple(axes.values()))

    def share_out(
        self, count: int, cost: float, names: tuple[str, ...]
    ) -> tuple[Int[np.ndarray, "owners places"], Bool[np.ndarray, " owners"]]:
        """The matrices of each owner, and which owners have their last place filled.

        Args:
            count: Of matrices, all of one shape.
            cost: Of one of them, in any unit.
            names: The axes whose devices are owners, the first one the major.

        Returns:
            Indices of matrices, each once but that an empty place has some index, and the places
            filled: all of them, but in owners with a False the last.
        """
        others = [i for i, name in enumerate(self._names) if name not in names]
        order = [self._names.index(name) for name in names] + others
        work = self._work.transpose(order)  # a view
        sizes = work.shape[: len(names)]
        owners = math.prod(sizes)
        each, left = divmod(count, owners)
        places = each + (left > 0)
        busy = work.reshape(owners, -1).max(axis=1)
        filled = np.full(owners, left == 0)
        filled[np.argsort(busy, kind="stable")[:left]] = True
        counts = np.where(filled, places, places - 1)
        work += (counts * cost).reshape(*sizes, *(1,) * len(others))
        starts = np.cumsum(counts) - counts
        matrices = np.minimum(starts[:, None] + np.arange(places), count - 1)
        return matrices, filled
