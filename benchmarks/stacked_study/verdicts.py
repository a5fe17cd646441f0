"""What was measured, and what it says."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

from stacked_study.counts import Compilation, Counts
from stacked_study.programs import Case, Form, Part
from stacked_study.settings import Policy, Settings
from stacked_study.timing import ALLOWED, Line, Time, line_through

ALLOWED_MEMORY = 1.01  # of lax.scan: buffers that hold no layer may differ
Statistic = Literal["flops", "seconds", "best_seconds", "processor_seconds"]
STATISTICS: dict[Statistic, str] = {
    "flops": "FLOPs of matrix products",
    "seconds": "median seconds",
    "best_seconds": "least seconds",
    "processor_seconds": "median processor seconds",
}
UNMASKED: dict[Form, str] = {"all active": "all layers", "by hand": "all at once"}


class Measurements(NamedTuple):
    """All of them; without repetitions there are no times, and programs of depths not counted."""

    flops: dict[Case, float]
    counts: dict[Case, Counts]
    num_programs: dict[Case, int]
    times: dict[Case, Time]
    compilations: list[Compilation]


def lines(measured: Measurements, settings: Settings) -> dict[tuple[Part, Policy, Statistic], Line]:
    """Of gradients and steps that take any depth, by each statistic that was measured."""
    found = {}
    parts: tuple[Part, ...] = ("gradient", "step")
    for part, policy, statistic in itertools.product(parts, settings.policies, STATISTICS):
        by_depth = {
            case.depth: cost
            for case in measured.flops
            if (case.part, case.form, case.policy) == (part, "dynamic", policy)
            and (cost := _cost(measured, case, statistic)) is not None
        }
        if by_depth:
            found[part, policy, statistic] = line_through(by_depth)
    return found


def _cost(measured: Measurements, case: Case, statistic: Statistic) -> float | None:
    if statistic == "flops":
        return measured.flops[case]
    return getattr(measured.times[case], statistic) if measured.times else None


def verdicts(measured: Measurements, settings: Settings) -> Iterator[str]:
    """A sentence for each question."""
    for (part, policy), of_part in itertools.groupby(
        lines(measured, settings).items(), key=lambda item: item[0][:2]
    ):
        found = [
            f"{STATISTICS[statistic]} {line.deviations[line.worst_depth]:+.1%} at depth "
            f"{line.worst_depth}, {'within' if line.holds else 'NOT within'}"
            for (_, _, statistic), line in of_part
        ]
        yield (
            f"{part.capitalize()} that saves {policy}, against a + b · (active blocks) ± "
            f"{ALLOWED:.0%}: {'; '.join(found)}."
        )
    yield _same_flops(measured)
    for policy in settings.policies:
        yield _memory(measured, policy)
    if Case("update", "all active", None, 0) in measured.times:
        for form, name in UNMASKED.items():
            of_all = measured.times[Case("update", form, None, 0)].seconds
            full, last = (
                measured.times[Case("update", "dynamic", None, depth)].seconds / of_all
                for depth in (0, settings.num_blocks)
            )
            yield (
                f"Update, against that of {name}: {full:.2f} × the time from depth 0, "
                f"{last:.2f} × from the last block."
            )
    for form in ("dynamic", "static"):
        own = [found for found in measured.compilations if found.form == form]
        counted = [
            f"{found.num_programs} compiled, of {found.characters / 1000:.0f} thousand characters, "
            f"with {found.num_blocks} blocks"
            for found in own
        ]
        yield f"{own[0].part.capitalize()} with {form} depth: {'; '.join(counted)}."


def _same_flops(measured: Measurements) -> str:
    same = all(
        measured.flops[dataclasses.replace(case, form="dynamic")] == flops
        for case, flops in measured.flops.items()
        if case.form in ("static", "lax.scan")
    )
    return (
        f"Traced depth: {'the same' if same else 'NOT the same'} FLOPs of matrix products as a "
        "static depth and as lax.scan."
    )


def _memory(measured: Measurements, policy: Policy) -> str:
    dynamic, scan = (
        measured.counts[Case("gradient", form, policy, 1)].temporary_bytes
        for form in ("dynamic", "lax.scan")
    )
    return (
        f"Gradient that saves {policy}: {dynamic / scan:.4f} × the temporary memory of lax.scan, "
        f"{'no more' if dynamic <= ALLOWED_MEMORY * scan else 'MORE'} than "
        f"{ALLOWED_MEMORY - 1:.0%} higher."
    )
