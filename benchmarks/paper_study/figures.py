"""Pictures of the contests."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from panels import draw_band, finish, legend
from paper_study.contest import Contest
from paper_study.outcomes import Outcome, part_label
from paper_study.presets import left_out
from paper_study.settings import Settings
from plots import STYLES
from racing import Run
from reporting import TITLES
from settings import REFERENCE, MethodName
from targets import SPLITS, accuracies


def make_figure(
    settings: Settings, contests: Sequence[Contest], outcomes: Sequence[Outcome]
) -> Figure:
    """The one that was asked for."""
    match settings.figure:
        case "averaged-curves":
            return _averaged_curves(settings, contests)
        case "speed-up-mnist" | "speed-up-fashion":
            return _speed_ups(settings, contests, outcomes)
        case _:
            return _curves(settings, contests)


def _curves(settings: Settings, contests: Sequence[Contest]) -> Figure:
    """Accuracy against time: the mean over seeds, in a band of smallest to largest."""
    figure = Figure(figsize=(12, 4.5 * len(contests)), layout="constrained")
    panels = figure.subplots(len(contests), len(SPLITS), squeeze=False)
    for row, contest in zip(panels, contests, strict=True):
        race = contest.chosen.race
        for axes, split in zip(row, SPLITS, strict=True):
            lowest = []
            for name in race.methods:
                runs = _runs(contest, name)
                shown = 100 * np.array([accuracies(run, split) for run in runs])
                draw_band(axes, [run.seconds for run in runs], shown, _style(name), TITLES[name])
                lowest.append(shown.mean(0)[shown.shape[1] // 5])
            axes.set_ylim(bottom=min(lowest))  # where they differ, not the climb
            axes.set_title(f"{race.dataset}, {split}")
            axes.set_xlabel("training seconds")
            axes.set_ylabel("accuracy (%)")
            finish(axes)
    figure.suptitle(f"Mean and range of {len(settings.seeds)} seeds, each method at its best rate")
    legend(figure, panels[0, 0])
    return figure


def _averaged_curves(settings: Settings, contests: Sequence[Contest]) -> Figure:
    """The mean over data sets and seeds, against time in parts of Muon's run."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, len(SPLITS))
    grid = np.linspace(0, 1, 101)
    for axes, split in zip(panels, SPLITS, strict=True):
        lowest = []
        for name in contests[0].chosen.race.methods:
            normalised = []
            for contest in contests:
                for run, reference in zip(
                    _runs(contest, name), _runs(contest, REFERENCE), strict=True
                ):
                    best = max(accuracies(reference, split)) or 1.0  # it may have learned nothing
                    time = np.array(run.seconds) / reference.seconds[-1]
                    # A run that has ended stays where it is.
                    normalised.append(
                        np.interp(grid, time, np.array(accuracies(run, split)) / best)
                    )
            colour, dash, _ = _style(name)
            shown = np.array(normalised)
            lowest.append(shown.mean(0)[len(grid) // 5])
            axes.plot(grid, shown.mean(0), dash, color=colour, label=TITLES[name])
            axes.fill_between(grid, shown.min(0), shown.max(0), color=colour, alpha=0.12, lw=0)
        axes.set_ylim(bottom=min(lowest))  # where they differ, not the climb
        axes.set_title(f"{split}ing accuracy" if split == "train" else "test accuracy")
        axes.set_xlabel("time, in Muon's")
        axes.set_ylabel("accuracy, in Muon's best")
        finish(axes)
    names = [contest.chosen.race.dataset for contest in contests]
    missing = left_out(settings, names)
    note = f"; WITHOUT {', '.join(missing)}" if missing else ""
    figure.suptitle(f"Mean and range of {', '.join(names)}, {len(settings.seeds)} seeds{note}")
    legend(figure, panels[0])
    return figure


def _speed_ups(
    settings: Settings, contests: Sequence[Contest], outcomes: Sequence[Outcome]
) -> Figure:
    """Times faster than Muon at the accuracies of its run, with intervals; gaps if not reached."""
    figure = Figure(figsize=(12, 4.5 * len(contests)), layout="constrained")
    panels = figure.subplots(len(contests), len(SPLITS), squeeze=False, sharey=True)
    highest = 0.0
    for row, contest, outcome in zip(panels, contests, outcomes, strict=True):
        methods = contest.chosen.race.methods
        for axes, split in zip(row, SPLITS, strict=True):
            shown: list[float] = []
            for i, name in enumerate(methods):
                colour, dash, marker = _style(name)
                # Side by side, so that intervals show.
                x = 100 * np.array(settings.parts) + 1.2 * (i - (len(methods) - 1) / 2)
                found = [outcome.find(name, split, part_label(part)) for part in settings.parts]
                y = np.array([speed_up.median or np.nan for speed_up in found])
                axes.plot(x, y, dash, color=colour, marker=marker, label=TITLES[name])
                shown += y[np.isfinite(y)].tolist()
                for at, speed_up in zip(x, found, strict=True):
                    if speed_up.interval is not None:
                        interval = speed_up.interval
                        axes.plot([at, at], [interval.low, interval.high], color=colour, lw=1)
            highest = max(highest, float(np.nanmax([2.0, *shown])))
            axes.set_xticks([100 * part for part in settings.parts])
            axes.set_title(f"{contest.chosen.race.dataset}, {split} accuracy")
            axes.set_xlabel("part of Muon's run (%), whose accuracy is to be reached")
            finish(axes)
        row[0].set_ylabel("times faster than Muon")
    panels[0, 0].set_ylim(0, 1.1 * highest)  # of all: they share it
    seeds = f"{len(settings.seeds)} seeds"
    figure.suptitle(f"Median of {seeds}; bars: 95 % interval of the geometric mean")
    legend(figure, panels[0, 0])
    return figure


def _style(name: MethodName) -> tuple[str, str, str]:
    colour, dash = STYLES[name]
    return colour, dash.rstrip("osv^"), "o"


def _runs(contest: Contest, name: MethodName) -> list[Run]:
    return [run for run in contest.runs if run.method == name]
