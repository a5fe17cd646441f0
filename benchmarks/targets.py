"""When did who reach which accuracy: from curves to a summary over seeds."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from racing import Run
from settings import REFERENCE, MethodName, Settings

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
NEVER = math.inf


class Target(NamedTuple):
    """An accuracy to reach, for each seed; the same number unless it is relative to the best."""

    split: Split
    label: str
    accuracy: dict[int, float]


class Reached(NamedTuple):
    """When an accuracy was first seen at an evaluation; infinite if it never was."""

    seconds: float
    steps: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """One method at one target, over the seeds."""

    method: MethodName
    target: Target
    seconds: list[float]
    """For each seed."""
    steps: list[float]
    """For each seed."""
    speed_ups: list[float]
    """Seconds of muon over seconds of this method, for each seed in which both arrived."""

    @property
    def num_reached(self) -> int:
        """In how many seeds the target was reached."""
        return sum(seconds < NEVER for seconds in self.seconds)


def accuracies(run: Run, split: Split) -> list[float]:
    """The curve of one split."""
    return run.train_accuracy if split == "train" else run.test_accuracy


def first_reached(run: Run, split: Split, accuracy: float) -> Reached:
    """The first evaluation with at least this accuracy."""
    for seconds, step, seen in zip(run.seconds, run.steps, accuracies(run, split), strict=True):
        if seen >= accuracy:
            return Reached(seconds, step)
    return Reached(NEVER, NEVER)


def make_targets(settings: Settings, runs: Sequence[Run]) -> list[Target]:
    """The given accuracies, and fractions of muon's best one if it takes part, for each split."""
    targets = []
    for split in SPLITS:
        for accuracy in settings.targets:
            same = {seed: accuracy for seed in settings.seeds}
            targets.append(Target(split, _percent(accuracy), same))
        best = {run.seed: max(accuracies(run, split)) for run in runs if run.method == REFERENCE}
        for fraction in settings.targets_of_best if best else ():
            relative = {seed: fraction * accuracy for seed, accuracy in best.items()}
            targets.append(Target(split, f"{_percent(fraction)} of Muon's best", relative))
    return targets


def summarise(settings: Settings, runs: Sequence[Run]) -> list[Summary]:
    """Every method at every target."""
    by_key = {(run.method, run.seed): run for run in runs}

    def reached(method: MethodName, target: Target) -> list[Reached]:
        return [
            first_reached(by_key[method, seed], target.split, target.accuracy[seed])
            for seed in settings.seeds
        ]

    summaries = []
    for target in make_targets(settings, runs):
        reference = reached(REFERENCE, target) if REFERENCE in settings.methods else []
        for method in settings.methods:
            own = reached(method, target)
            speed_ups = [
                muon.seconds / mine.seconds
                for muon, mine in zip(reference, own, strict=bool(reference))
                if muon.seconds < NEVER and 0 < mine.seconds < NEVER
            ]
            seconds, steps = [r.seconds for r in own], [r.steps for r in own]
            summaries.append(Summary(method, target, seconds, steps, speed_ups))
    return summaries


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"


def median_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """The median and, in brackets, smallest and largest, where never reached is infinitely late."""
    median = statistics.median(values)
    if median == NEVER:
        num_reached = sum(value < NEVER for value in values)
        return f"{num_reached} of {len(values)} seeds" if num_reached else "not reached"

    def show(value: float) -> str:
        return "never" if value == NEVER else f"{value:.{digits}f}"

    if len(values) == 1:
        return show(median)
    return f"{show(median)} ({show(min(values))}–{show(max(values))})"


def show_speed_up(summary: Summary) -> str:
    """The median over seeds of paired ratios, and over how many seeds if not all arrived."""
    if not summary.speed_ups:
        return "–"
    text = f"{statistics.median(summary.speed_ups):.2f}×"
    if len(summary.speed_ups) < len(summary.seconds):
        text += f" ({len(summary.speed_ups)}/{len(summary.seconds)})"
    return text
