"""What the study leaves behind: tables, plots and plain numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from estimator_study.all_layers import Errors, Trajectory
from estimator_study.dropped_layers import EMA, VARIANTS, Measured, Rule, grid
from estimator_study.settings import ProblemName, Settings

AllLayers = Mapping[tuple[ProblemName, Trajectory], Mapping[str, Errors]]
Dropped = Mapping[Rule, Mapping[str, Float[np.ndarray, "seeds configurations"]]]

# Okabe and Ito's colours, which colour-blind readers can tell apart; a dash as well.
STYLES = {
    "gradient": ("#777777", ":"),
    "EMA": ("#000000", "-"),
    "MVR-1": ("#D55E00", "-"),
    "MVR-2, q 0.5": ("#0072B2", "-"),
    "MVR-2, q 0.1": ("#0072B2", "--"),
    "MVR-3, q 0.5": ("#009E73", "-"),
    "MVR-3, q 0.1": ("#009E73", "--"),
    "MARS": ("#CC79A7", "-"),
    "MARS, no limit": ("#CC79A7", "--"),
}
_TIE = 1e-3  # rules whose means differ by less than this fraction share the first place


@dataclasses.dataclass(frozen=True)
class Rank:
    """How a rule compares with the best rule of each configuration."""

    rule: Rule
    firsts: int
    """Configurations in which it was the best, ties included."""
    median: float
    """The median ratio of its measure to the best one."""
    worst: float
    """The largest ratio."""


def rank(rules: Sequence[Rule], dropped: Dropped, measure: str) -> list[Rank]:
    """All rules by one of the fields of `Measured`, in the order of their median ratios."""
    means = np.stack([dropped[rule][measure].mean(0) for rule in rules])
    ratios = means / means.min(0)
    ranks = [
        Rank(
            rule, int(np.sum(of_rule <= 1 + _TIE)), float(np.median(of_rule)), float(of_rule.max())
        )
        for rule, of_rule in zip(rules, ratios, strict=True)
    ]
    return sorted(ranks, key=lambda of_rule: of_rule.median)


def rules_of(variant: int, dropped: Dropped) -> list[Rule]:
    """Those of a variant of MVR."""
    return [rule for rule in dropped if rule.variant == variant]


def waking_by_noise(
    settings: Settings, dropped: Dropped, rule: Rule, measure: str
) -> dict[float, float]:
    """The measure of a rule over that of "correct" at the same point: geometric means by noise."""
    correct = dataclasses.replace(rule, on_waking="correct")
    ratios = np.log(dropped[rule][measure].mean(0) / dropped[correct][measure].mean(0))
    noises = np.array([configuration.noise for configuration in grid(settings)])
    return {noise: float(np.exp(ratios[noises == noise].mean())) for noise in settings.layer_noises}


def print_tables(
    console: Console, settings: Settings, all_layers: AllLayers, dropped: Dropped
) -> None:
    """Errors of all estimators, and those of dropped layers with the ranks of the rules."""
    for (problem, trajectory), errors in all_layers.items():
        console.print(_errors_table(settings, problem, trajectory, errors))
    for variant in VARIANTS:
        console.print(_winners_table(settings, variant, dropped))
    for variant in VARIANTS:
        console.print(_rank_table(settings, variant, dropped))
        console.print(verdict(variant, dropped), highlight=False)
    console.print(_waking_table(settings, dropped))


def verdict(variant: int, dropped: Dropped) -> str:
    """Which rule had the smallest error, and how the EMA compares, in a sentence."""
    first, second, *_ = rank(rules_of(variant, dropped), dropped, "active")
    best = dropped[first.rule]["active"].mean(0)
    ratios = dropped[EMA]["active"].mean(0) / best
    return (
        f"MVR-{variant}: '{first.rule.name}' has the smallest median ratio of its error to the best"
        f" rule's, {first.median:.3f}, and is best in {first.firsts} of {len(best)} configurations;"
        f" then comes '{second.rule.name}', {second.median:.3f}. The error of the EMA is"
        f" {np.median(ratios):.2f} × its own in the median, and smaller in {np.sum(ratios < 1)}."
    )


def _errors_table(
    settings: Settings, problem: str, trajectory: str, errors: Mapping[str, Errors]
) -> Table:
    largest = max(np.max(of_one.standard_error / of_one.steady) for of_one in errors.values())
    table = _table(
        f"{problem}, {'one trajectory for all' if trajectory == 'common' else 'own trajectories'}",
        f"mean ‖M - ∇f‖ in the second half of the steps; standard errors up to {largest:.1%}",
    )
    table.add_column("radius\ndecay", no_wrap=True)
    for radius in settings.radii:
        for decay in settings.decays:
            table.add_column(f"{radius:g}\n{decay:g}", justify="right")
    best = np.min([of_one.steady for of_one in errors.values()], axis=0)
    for name, of_one in errors.items():
        cells = zip(of_one.steady.ravel(), best.ravel(), strict=True)
        table.add_row(name, *(_bold(f"{error:.3f}", error == least) for error, least in cells))
    return table


def _winners_table(settings: Settings, variant: int, dropped: Dropped) -> Table:
    rules = rules_of(variant, dropped)
    means = np.stack([dropped[rule]["active"].mean(0) for rule in rules])
    package = dropped[Rule(rules[0].variant)]["active"].mean(0)
    table = _table(
        f"Dropped layers, MVR-{variant}", "mean ‖M - ∇f‖ over the active layers of a step"
    )
    columns = ("radius", "noise", "coupling", "decay", "EMA", Rule(rules[0].variant).name, "best")
    for heading in columns:
        table.add_column(heading.replace(", ", ",\n"), justify="right")
    table.add_column("winner", no_wrap=True)
    for i, configuration in enumerate(grid(settings)):
        numbers = (dropped[EMA]["active"].mean(0)[i], package[i], means[:, i].min())
        table.add_row(
            *(f"{value:g}" for value in configuration),
            *(f"{number:.3f}" for number in numbers),
            rules[int(means[:, i].argmin())].name,
        )
    return table


def _rank_table(settings: Settings, variant: int, dropped: Dropped) -> Table:
    rules = rules_of(variant, dropped)
    table = _table(
        f"Rules for dropped layers, MVR-{variant}",
        f"median ratios to the best rule of each of {len(grid(settings))} configurations;\n"
        "of active layers also how often it is the best, and the worst ratio",
    )
    table.add_column("second gradient at,\non waking", no_wrap=True)
    headings = {
        "active": "active layers",
        "first_layer": "layer 0",
        "head": "head",
        "value": "f",
    }
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    by_measure = {
        measure: {of_rule.rule: of_rule for of_rule in rank(rules, dropped, measure)}
        for measure in headings
    }
    for rule in by_measure["active"]:
        ranks = (by_measure[measure][rule] for measure in headings)
        active, *others = ranks
        table.add_row(
            rule.name,
            f"{active.firsts:2d}  {active.median:.3f}  {active.worst:5.2f}",
            *(f"{of_measure.median:.3f}" for of_measure in others),
        )
    return table


def _waking_table(settings: Settings, dropped: Dropped) -> Table:
    table = _table(
        "On waking, by noise",
        "active layers, layer 0, f: ratio to 'correct', second gradient at own step",
    )
    table.add_column("rule", no_wrap=True)
    for noise in settings.layer_noises:
        table.add_column(f"noise {noise:g}", justify="right", no_wrap=True)
    for rule in dropped:
        if rule.variant and rule.point == "own step" and rule.on_waking != "correct":
            columns = [
                waking_by_noise(settings, dropped, rule, measure)
                for measure in ("active", "first_layer", "value")
            ]
            table.add_row(
                f"MVR-{rule.variant}, {rule.on_waking}",
                *(
                    "  ".join(f"{column[noise]:.2f}" for column in columns)
                    for noise in settings.layer_noises
                ),
            )
    return table


def _bold(text: str, bold: bool) -> str:
    return f"[bold]{text}[/bold]" if bold else text


def _table(title: str, note: str) -> Table:
    return Table(title=f"{title}\n{note}", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))


def record(settings: Settings, all_layers: AllLayers, dropped: Dropped) -> dict[str, Any]:
    """Everything that was measured, as plain numbers."""
    return {
        "all_layers": [
            {
                "problem": problem,
                "trajectory": trajectory,
                "estimator": name,
                "steady": of_one.steady.tolist(),
                "standard_error": of_one.standard_error.tolist(),
            }
            for (problem, trajectory), errors in all_layers.items()
            for name, of_one in errors.items()
        ],
        "configurations": [configuration._asdict() for configuration in grid(settings)],
        "dropped_layers": [
            {
                **dataclasses.asdict(rule),
                **{measure: of_rule[measure].tolist() for measure in Measured._fields},
            }
            for rule, of_rule in dropped.items()
        ],
        "ranks": [
            {
                "variant": variant,
                "measure": measure,
                "rules": [dataclasses.asdict(of_rule) for of_rule in ranks],
            }
            for variant in VARIANTS
            for measure in Measured._fields
            for ranks in [rank(rules_of(variant, dropped), dropped, measure)]
        ],
    }


def steps_figure(settings: Settings, errors: Mapping[str, Errors], title: str) -> Figure:
    """The errors over the steps, a panel for each radius and decay."""
    shape = len(settings.decays), len(settings.radii)
    figure = Figure(figsize=(4 * shape[1] + 1.5, 3 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, sharex=True, squeeze=False)
    for d, decay in enumerate(settings.decays):
        for r, radius in enumerate(settings.radii):
            axes = panels[d, r]
            for name, of_one in errors.items():
                colour, dash = STYLES[name]
                axes.plot(of_one.mean_of_steps[r, d], dash, color=colour, label=name, linewidth=1.2)
            axes.set_yscale("log")
            axes.set_title(f"radius {radius:g}, decay {decay:g}")
            axes.grid(alpha=0.3)
        panels[d, 0].set_ylabel("‖M - ∇f‖")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    figure.suptitle(title)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def ratios_figure(dropped: Dropped) -> Figure:
    """The error of every rule over the best one's: all configurations, their median a bar."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(VARIANTS), sharex=True, squeeze=False)[0]
    for variant, axes in zip(VARIANTS, panels, strict=True):
        rules = [of_rule.rule for of_rule in rank(rules_of(variant, dropped), dropped, "active")]
        means = np.stack([dropped[rule]["active"].mean(0) for rule in rules])
        for row, ratios in enumerate(means / means.min(0)):
            axes.plot(ratios, np.full_like(ratios, row), "|", color="#0072B2", alpha=0.5)
            axes.plot(np.median(ratios), row, "D", color="#D55E00", markersize=5)
        axes.set_yticks(range(len(rules)), [rule.name for rule in rules])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("error of the active layers / that of the best rule")
        axes.set_title(f"MVR-{variant}, median ◆")
        axes.grid(alpha=0.3)
    return figure
