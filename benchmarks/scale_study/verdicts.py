"""What was counted, and what it says."""

from collections.abc import Iterator
from typing import NamedTuple

from scale_study.model import NOTE, ModelledStep
from scale_study.programs import LAYOUTS, Agreement, Case, Counts
from scale_study.settings import Method, Settings
from scale_study.tables import Question, depths

TITLES: dict[Method, str] = {
    "set_mesh": "jax.set_mesh alone",
    "on_mesh": "on_mesh(shardings)",
    "owner": "layout owner",
    "optax": "optax.contrib.muon",
}


class Measurements(NamedTuple):
    """All of them."""

    counts: dict[Case, Counts]
    cases: dict[Question, list[Case]]
    """Of the counts."""
    agreements: list[Agreement]
    modelled: list[ModelledStep]


def bytes_over_least(counts: Counts) -> float | None:
    """Of what is in no loop of unknown length; None if nothing need move."""
    return counts.traffic.num_bytes / counts.least_bytes if counts.least_bytes else None


def verdicts(measured: Measurements, settings: Settings) -> Iterator[str]:
    """A sentence for each question."""
    for method in settings.methods:
        if len(settings.num_steps) > 1 and any(
            case.method == method for case in measured.cases["num_steps"]
        ):
            yield _by_iteration(measured, method)
    for method in settings.methods:
        yield from _by_number(measured, settings, method)
    for method in settings.methods:
        if method in LAYOUTS:
            yield from _frozen(measured, settings, method)
            yield from _planned(measured, settings, method)
    largest = max((it.max_abs_difference for it in measured.agreements), default=None)
    if largest is not None:
        updates = max(it.max_abs_update for it in measured.agreements)
        yield (
            f"Results of {len(measured.agreements)} steps on {settings.devices} devices differ "
            f"from those on one by at most {largest:.1e}, of updates up to {updates:.1e}."
        )
    yield from _modelled(measured, settings)


def _by_iteration(measured: Measurements, method: Method) -> str:
    """Whether the collectives are the same at any number of steps of the iteration."""
    numbers: dict[str, set[int]] = {}
    for case in measured.cases["num_steps"]:
        if case.method == method:
            traffic = measured.counts[case].traffic
            numbers.setdefault(case.arrangement, set()).add(traffic.num_collectives)
    same = all(len(of_arrangement) == 1 for of_arrangement in numbers.values())
    counted = ", ".join(f"{_span(found)} {name}" for name, found in numbers.items())
    return (
        f"{TITLES[method]}: the number of collectives {'does not depend' if same else 'DEPENDS'} "
        f"on the number of steps of the iteration ({counted})."
    )


def _by_number(measured: Measurements, settings: Settings, method: Method) -> Iterator[str]:
    for arrangement in settings.arrangements:
        found = [
            (case.num_matrices, measured.counts[case])
            for case in measured.cases["matrices"]
            if (case.arrangement, case.method) == (arrangement, method)
        ]
        if not found:
            continue
        numbers = {counts.traffic.num_collectives for _, counts in found}
        ratios = [ratio for _, c in found if (ratio := bytes_over_least(c)) is not None]
        if ratios:
            span = f"{min(ratios):.2f}–{max(ratios):.2f} × the least bytes"
        else:
            largest = max(counts.traffic.num_bytes for _, counts in found)
            span = f"{largest / 1e3:.0f} kB at most, where nothing need move"
        yield (
            f"{TITLES[method]}, {arrangement}: {_span(numbers)} collectives for "
            f"{_span({number for number, _ in found})} matrices, {span}."
        )


def _frozen(measured: Measurements, settings: Settings, method: Method) -> Iterator[str]:
    """Whether each depth moves what a network of its active layers alone moves."""
    pairs = [
        (measured.counts[case].traffic, measured.counts[alone].traffic)
        for case in measured.cases["depth"]
        if case.method == method and not case.is_traced
        for alone in measured.cases["alone"]
        if (alone.arrangement, alone.method) == (case.arrangement, method)
        and alone.num_matrices == case.num_matrices - case.depth
    ]
    if not pairs:
        return
    more = sum(traffic.num_bytes > alone.num_bytes for traffic, alone in pairs)
    outcome = f"{more} of {len(pairs)} move MORE" if more else f"none of {len(pairs)} moves more"
    yield (
        f"{TITLES[method]}: of the steps from layers {_span(set(depths(settings)))} on, {outcome} "
        "bytes than the step of a network without the frozen layers."
    )


def _planned(measured: Measurements, settings: Settings, method: Method) -> Iterator[str]:
    """How `plan_layouts` compares with what is counted."""
    for arrangement in settings.arrangements:
        ratios = [
            counts.traffic.num_bytes / counts.planned_bytes
            for case, counts in measured.counts.items()
            if (case.arrangement, case.method) == (arrangement, method) and counts.planned_bytes
        ]
        if ratios:
            yield (
                f"{TITLES[method]}, {arrangement}: {min(ratios):.2f}–{max(ratios):.2f} × the bytes "
                "that plan_layouts says."
            )


def _modelled(measured: Measurements, settings: Settings) -> Iterator[str]:
    by_key = {(it.network, it.devices, it.optimizer, it.sharing): it for it in measured.modelled}
    for network in settings.networks:
        devices = max(settings.pod_devices)
        muon = by_key[network, devices, "Muon", "auto"]
        drop = by_key[network, devices, "Drop-Muon", "auto"]
        optax = by_key[network, devices, "Muon", "optax"]
        yield (
            f"{NOTE.capitalize()}: {network} on {devices} devices, the optimizer takes "
            f"{muon.optimizer_share:.1%} of a step, as optax is shared out "
            f"{optax.optimizer_share:.1%}; Drop-Muon's step takes "
            f"{drop.seconds / muon.seconds:.2f} × the time of Muon's."
        )


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"
