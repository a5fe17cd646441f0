"""What the study leaves behind: tables of slopes, plots and plain numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rates_study.settings import Settings
from rates_study.slopes import Slope, fit_slope, horizons, late_average, running_average

Average = Literal["all steps", "later half"]
AVERAGES = {"all steps": running_average, "later half": late_average}

# Okabe and Ito's colours, which colour-blind readers can tell apart; a dash as well.
STYLES = {
    "EMA": ("#000000", "-"),
    "MVR-1": ("#D55E00", "-"),
    "MVR-2": ("#0072B2", "--"),
    "MVR-3": ("#009E73", "-."),
}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The runs of one method with one radius, and the slopes of their averages."""

    problem: str
    method: str
    radius: float
    bound: float
    """The exponent of K in the upper bound of the theory."""
    predicted: float | None
    """The exponent of f - f* if ∇f is as large as the error of M, which the bound lets be
    K^bound: bound · p / (p - 1) for |y|^p. Not for the non-convex problem."""
    at: Int[np.ndarray, " horizons"]
    averages: dict[str, Float[np.ndarray, "seeds horizons"]]
    slopes: dict[str, Slope]

    @property
    def middle(self) -> float:
        """The mean over all steps and seeds at the horizon in the middle."""
        return float(self.averages["all steps"][:, len(self.at) // 2].mean())


def fit(
    settings: Settings,
    measured: Float[np.ndarray, "seeds measurements"],
    *,
    problem: str,
    method: str,
    radius: float,
    bound: float,
    predicted: float | None = None,
) -> Fitted:
    """Averages up to every horizon, and their slopes."""
    at = horizons(settings.horizon, settings.measure_every, settings.decades)
    columns = at // settings.measure_every - 1
    averages = {
        name: average(measured.astype(np.float64))[:, columns] for name, average in AVERAGES.items()
    }
    slopes = {name: fit_slope(at, values, settings.seed) for name, values in averages.items()}
    return Fitted(problem, method, radius, bound, predicted, at, averages, slopes)


def chosen(fits: Sequence[Fitted]) -> dict[tuple[str, str], Fitted]:
    """Of each problem and method the radius that is best at the horizon in the middle."""
    best: dict[tuple[str, str], Fitted] = {}
    for of_radius in fits:
        key = of_radius.problem, of_radius.method
        if key not in best or of_radius.middle < best[key].middle:
            best[key] = of_radius
    return best


def print_tables(console: Console, settings: Settings, fits: Sequence[Fitted]) -> None:
    """The slopes of every problem, method and radius."""
    for problem in dict.fromkeys(of_radius.problem for of_radius in fits):
        console.print(_slopes_table(settings, problem, fits))


def _slopes_table(settings: Settings, problem: str, fits: Sequence[Fitted]) -> Table:
    of_problem = [of_radius for of_radius in fits if of_radius.problem == problem]
    first, last = of_problem[0].at[[0, -1]]
    table = Table(
        title=f"{problem}\nslopes over K = {first:,} … {last:,}, 95 % intervals of "
        f"{settings.num_seeds} seeds\n* best radius at K = "
        f"{of_problem[0].at[len(of_problem[0].at) // 2]:,}",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    headings = ("radius", "upper\nbound", "pre-\ndicted", "mean of all steps", "of the later half")
    for heading in (*headings, f"value at\n{last:,}"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = chosen(fits)
    for of_radius in of_problem:
        table.add_row(
            of_radius.method,
            f"{of_radius.radius:g}{'*' if best[problem, of_radius.method] is of_radius else ' '}",
            f"{of_radius.bound:.3f}",
            "" if of_radius.predicted is None else f"{of_radius.predicted:.3f}",
            *(_interval(of_radius.slopes[average]) for average in AVERAGES),
            f"{of_radius.averages['later half'][:, -1].mean():.3g}",
        )
    return table


def _interval(slope: Slope) -> str:
    """The slope and the wider half of its interval."""
    return f"{slope.value:.3f} ± {max(slope.value - slope.low, slope.high - slope.value):.3f}"


def record(fits: Sequence[Fitted]) -> list[dict[str, Any]]:
    """Everything that was fitted, as plain numbers."""
    best = chosen(fits)
    return [
        {
            "problem": of_radius.problem,
            "method": of_radius.method,
            "radius": of_radius.radius,
            "chosen": best[of_radius.problem, of_radius.method] is of_radius,
            "bound": of_radius.bound,
            "predicted": of_radius.predicted,
            "horizons": of_radius.at.tolist(),
            "means": {name: of.mean(0).tolist() for name, of in of_radius.averages.items()},
            "slopes": {name: dataclasses.asdict(of) for name, of in of_radius.slopes.items()},
        }
        for of_radius in fits
    ]


def figure(fits: Sequence[Fitted], labels: Mapping[str, str]) -> Figure:
    """The mean of the later half against K, for every problem and radius, with the bounds."""
    panels = list(dict.fromkeys((of.problem, of.radius) for of in fits))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    picture = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (problem, radius) in zip(grid, panels, strict=False):
        of_panel = [of for of in fits if (of.problem, of.radius) == (problem, radius)]
        bounds: dict[float, tuple[np.ndarray, float]] = {}
        for of in of_panel:
            colour, dash = STYLES[of.method]
            values = of.averages["later half"]
            low, high = np.percentile(values, [10, 90], axis=0)
            axes.plot(of.at, values.mean(0), dash, color=colour, label=of.method)
            axes.fill_between(of.at, low, high, color=colour, alpha=0.12, linewidth=0)
            bounds.setdefault(of.bound, (of.at, float(values[:, 0].mean())))
        for bound, (at, start) in bounds.items():
            axes.plot(at, start * (at / at[0]) ** bound, ":", color="#777777", linewidth=1)
            axes.annotate(f"{bound:.2f}", (at[-1], start * (at[-1] / at[0]) ** bound), fontsize=7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{problem}, radius {radius:g}", fontsize="medium")
        axes.set_xlabel("K")
        axes.set_ylabel(labels[problem])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    picture.suptitle("Mean over K/2 < k ≤ K and seeds (band: 10 to 90 %); dotted: upper bounds")
    return picture
