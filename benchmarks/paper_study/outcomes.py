"""When did who reach what Muon had reached: speed-ups paired by seed, with intervals."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from jax.scipy.special import betainc

from paper_study.contest import Contest
from paper_study.settings import Settings
from racing import Run
from reporting import TITLES
from settings import REFERENCE, MethodName
from targets import SPLITS, Split, accuracies

NEVER = math.inf
CONFIDENCE = 0.95
OPPONENTS: tuple[MethodName, ...] = ("muon", "optax_muon", "muon_short")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A geometric mean, and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """Of a method at a target against an opponent, seed by seed."""

    method: MethodName
    opponent: MethodName
    split: Split
    target: str
    accuracy_by_seed: list[float]
    seconds_by_seed: list[float]
    opponent_seconds_by_seed: list[float]

    @property
    def ratios(self) -> list[float | None]:
        """Seconds of the opponent over own; 0 if only the opponent arrived, None if nobody did.

        Infinite if only this method arrived.
        """
        pairs = zip(self.opponent_seconds_by_seed, self.seconds_by_seed, strict=True)
        return [_ratio(*pair) for pair in pairs]

    @property
    def median(self) -> float | None:
        """Over the seeds; None if with one of the middle somebody did not arrive."""
        ratios = sorted(ratio for ratio in self.ratios if ratio is not None)
        if len(ratios) < len(self.ratios):
            return None
        middle = ratios[(len(ratios) - 1) // 2 : len(ratios) // 2 + 1]
        return statistics.fmean(middle) if 0 < middle[0] and middle[-1] < NEVER else None

    @property
    def num_reached(self) -> int:
        """With how many seeds the method reached the target."""
        return sum(seconds < NEVER for seconds in self.seconds_by_seed)

    @property
    def interval(self) -> Interval | None:
        """None for a single seed, or if with some seed somebody did not arrive."""
        ratios = [ratio for ratio in self.ratios if ratio is not None and 0 < ratio < NEVER]
        return geometric_interval(ratios) if len(ratios) == len(self.ratios) > 1 else None


@dataclasses.dataclass(frozen=True)
class EqualTime:
    """Test accuracy of a method when Muon's run ends, minus Muon's; its last if it ended before."""

    method: MethodName
    difference_by_seed: list[float]
    seconds_by_seed: list[float]
    """Of its whole run, in Muon's."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a data set."""

    speed_ups: list[SpeedUp]
    equal_time: list[EqualTime]
    seed_spread: float
    """Largest minus smallest final test accuracy of Muon over the seeds."""

    def find(
        self, method: MethodName, split: Split, target: str, opponent: MethodName = REFERENCE
    ) -> SpeedUp:
        """One of the speed-ups."""
        wanted = method, split, target, opponent
        return next(
            it for it in self.speed_ups if (it.method, it.split, it.target, it.opponent) == wanted
        )


def summarise(settings: Settings, contest: Contest) -> Outcome:
    """Every method at every target, against every opponent that takes part."""
    methods = contest.chosen.race.methods
    runs = {(run.method, run.seed): run for run in contest.runs}
    speed_ups = []
    for split in SPLITS:
        targets = {
            part_label(part): [
                best_after(runs[REFERENCE, seed], split, part) for seed in settings.seeds
            ]
            for part in settings.parts
        } | {f"{100 * level:.4g} %": [level] * len(settings.seeds) for level in settings.targets}
        for target, levels in targets.items():
            seconds = {
                name: [
                    seconds_to(runs[name, seed], split, level)
                    for seed, level in zip(settings.seeds, levels, strict=True)
                ]
                for name in methods
            }
            speed_ups += [
                SpeedUp(name, opponent, split, target, levels, seconds[name], seconds[opponent])
                for opponent in OPPONENTS
                if opponent in methods
                for name in methods
            ]
    references = [runs[REFERENCE, seed] for seed in settings.seeds]
    equal_time = []
    for name in methods:
        own = [runs[name, seed] for seed in settings.seeds]
        pairs = list(zip(own, references, strict=True))
        equal_time.append(
            EqualTime(
                name,
                [_accuracy_at(a, b.seconds[-1]) - b.test_accuracy[-1] for a, b in pairs],
                [a.seconds[-1] / b.seconds[-1] for a, b in pairs],
            )
        )
    finals = [run.test_accuracy[-1] for run in references]
    return Outcome(speed_ups, equal_time, max(finals) - min(finals))


def part_label(part: float) -> str:
    """A target that is Muon's accuracy after a part of its run."""
    return f"Muon's after {100 * part:.4g} %"


def best_after(run: Run, split: Split, part: float) -> float:
    """The best accuracy that was seen in the first part of a run."""
    last = part * run.steps[-1]
    seen = zip(run.steps, accuracies(run, split), strict=True)
    return max(accuracy for step, accuracy in seen if step <= last * (1 + 1e-9))


def seconds_to(run: Run, split: Split, accuracy: float) -> float:
    """When an accuracy was reached, on straight lines between evaluations; infinite if never.

    Without the lines a run of shorter steps, which is evaluated more often on the clock, would be
    at an advantage.
    """
    seen = accuracies(run, split)
    if seen[0] >= accuracy:
        return run.seconds[0]
    for i in range(1, len(seen)):
        if seen[i] >= accuracy:
            share = (accuracy - seen[i - 1]) / (seen[i] - seen[i - 1])
            return run.seconds[i - 1] + share * (run.seconds[i] - run.seconds[i - 1])
    return NEVER


def geometric_interval(ratios: Sequence[float]) -> Interval:
    """By Student's t of the logarithms."""
    logs = np.log(ratios)
    centre = float(logs.mean())
    half = student_quantile(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half))


def student_quantile(degrees_of_freedom: int) -> float:
    """Within which Student's t lies, in absolute value, with 95 % probability; by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        x = degrees_of_freedom / (degrees_of_freedom + middle**2)
        outside = float(betainc(degrees_of_freedom / 2, 0.5, x))
        low, high = (middle, high) if outside > 1 - CONFIDENCE else (low, middle)
    return (low + high) / 2


def _accuracy_at(run: Run, seconds: float) -> float:
    return float(np.interp(seconds, run.seconds, run.test_accuracy))


def _ratio(opponent: float, own: float) -> float | None:
    if own == NEVER:
        return None if opponent == NEVER else 0.0
    if opponent == own:
        return 1.0
    return opponent / own if own else NEVER


def verdicts(settings: Settings, outcome: Outcome, dataset: str) -> list[str]:
    """For each Drop-Muon whether it kept what was hoped for: a sentence."""
    sentences = []
    for equal in outcome.equal_time:
        if not equal.method.startswith("drop_"):
            continue
        hopes = [
            _speed_hope(outcome.find(equal.method, "test", part_label(part), opponent), wanted)
            for opponent in ("muon", "optax_muon")
            if any(speed_up.opponent == opponent for speed_up in outcome.speed_ups)
            for part, wanted in ((0.8, 1.4), (0.2, 0.95))
            if part in settings.parts
        ]
        worst = 100 * min(equal.difference_by_seed)
        said = f"test accuracy at Muon's end {worst:+.2f} points with the worst seed"
        spread = 100 * outcome.seed_spread
        if len(equal.difference_by_seed) == 1:
            hopes.append(f"{said}, the only one: no spread to compare it with")
        else:
            kept = "" if worst >= -spread else "NOT "
            hopes.append(f"{said}, {kept}within Muon's spread of {spread:.2f}")
        sentences.append(f"{dataset}, {TITLES[equal.method]}: {'; '.join(hopes)}.")
    return sentences


def _speed_hope(speed_up: SpeedUp, wanted: float) -> str:
    ratio = speed_up.median
    kept = "" if ratio is not None and ratio >= wanted else "NOT "
    reached = f"reached with {speed_up.num_reached} of {len(speed_up.ratios)} seeds"
    shown = reached if ratio is None else f"{ratio:.2f}×"
    opponent = TITLES[speed_up.opponent]
    return f"{kept}≥ {wanted:g}× to {speed_up.target} against {opponent} ({shown})"
