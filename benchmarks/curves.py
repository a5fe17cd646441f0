"""Reading loss curves between their evaluations."""

import math
from collections.abc import Sequence

NEVER = math.inf


def first_reached(at: Sequence[float], losses: Sequence[float], loss: float) -> float:
    """Where a loss is reached first, on the straight lines between evaluations; else infinite.

    Args:
        at: Where each evaluation was, ascending: steps, seconds, or what else was spent.
        losses: What each evaluation saw; infinite where the run had diverged.
        loss: To be reached; infinite is never reached.
    """
    if not math.isfinite(loss):
        return NEVER
    for i, seen in enumerate(losses):
        if seen <= loss:
            before = losses[i - 1]
            if i == 0 or not math.isfinite(before):
                return at[i]
            return at[i] + (at[i - 1] - at[i]) * (loss - seen) / (before - seen)
    return NEVER
