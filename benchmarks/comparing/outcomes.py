"""What the runs of a record say: who is where when, and how much of the budget that saves."""

import math
from collections.abc import Sequence

import numpy as np

from analysis.search import CRITERIA
from comparing.settings import REFERENCE
from drawing import median
from study import Record

PARTS = (0.2, 0.5, 0.8, 1.0)


def budgets(record: Record) -> Sequence[float]:
    """Ascending."""
    return record["settings"]["budgets"]


def methods(record: Record) -> Sequence[str]:
    """In the order in which they were named."""
    return record["settings"]["methods"]


def runs_of(record: Record, method: str, budget: float) -> list[Record]:
    """Of all seeds, in their order."""
    return [run for run in record["runs"] if (run["method"], run["budget"]) == (method, budget)]


def final(record: Record, method: str, budget: float, split: str = "test") -> list[float | None]:
    """The measure at the end of each run; None where a run has diverged."""
    return [run[split][-1] for run in runs_of(record, method, budget)]


def first_reached(
    at: Sequence[float], measured: Sequence[float | None], value: float
) -> float | None:
    """Where a measure is first as low as a value, on the straight lines between evaluations."""
    for i, seen in enumerate(measured):
        if seen is not None and seen <= value:
            before = measured[i - 1] if i else None
            if before is None:
                return at[i]
            return at[i] + (at[i - 1] - at[i]) * (value - seen) / (before - seen)
    return None


def reached(record: Record, method: str, part: float) -> list[float | None]:
    """Times sooner, seed by seed, than Muon where Muon is after a part of its largest budget."""
    largest, ratios = budgets(record)[-1], []
    pairs = zip(runs_of(record, REFERENCE, largest), runs_of(record, method, largest), strict=True)
    for reference, own in pairs:
        at, measured = reference["spent"], reference["test"]
        value = float(np.interp(part * largest, at, _numbers(measured)))
        theirs = first_reached(at, measured, value)
        ours = first_reached(own["spent"], own["test"], value)
        ratios.append(theirs / ours if theirs and ours else None)
    return ratios


def saved(record: Record, method: str, budget: float) -> list[float]:
    """The budget that Muon needs for the same test measure, over this one, seed by seed.

    Between budgets Muon is on a straight line in the logarithm of the budget, through the best that
    its medians have been so far: it is not made worse by a larger budget. A run that is better than
    Muon at its largest budget, or worse than at its smallest, counts as one that is equal.
    """
    at, best = np.log(budgets(record)), _best_so_far(record)
    values = np.clip(_numbers(final(record, method, budget)), best[-1], best[0])
    return [float(np.exp(np.interp(-value, -best, at)) / budget) for value in values]


def show_saved(record: Record, method: str, budget: float) -> str:
    """The median of :func:`saved`; with ≥ or ≤ where it is known to be no more than a bound."""
    value, best = median(final(record, method, budget)), _best_so_far(record)
    is_worse = value is None or value > best[0]
    sign = "≤ " if is_worse else "≥ " if value is not None and value < best[-1] else ""
    return f"{sign}{np.median(saved(record, method, budget)):.2f}×"


def predicted(record: Record, method: str) -> dict[str, list[float]]:
    """By criterion, the speed-up that theory expects at each budget; empty if it was not asked."""
    found = [of for of in record.get("predicted", ()) if of["method"] == method]
    return {of: [one[of] for one in found] for of in CRITERIA} if found else {}


def _best_so_far(record: Record) -> np.ndarray:
    """Of Muon's medians on test data, for each budget."""
    medians = [median(final(record, REFERENCE, budget)) for budget in budgets(record)]
    return np.minimum.accumulate(_numbers(medians))


def time_agreement(record: Record, method: str, budget: float) -> float | None:
    """Seconds that passed over those of single steps, added up; the median of runs."""
    ratios = []
    for run in runs_of(record, method, budget):
        steps = zip(record["step_seconds"][method], run["depths"], strict=True)
        ratios.append(run["seconds"][-1] / sum(seconds * count for seconds, count in steps))
    return median(ratios)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.inf if value is None else value for value in values])
