"""Programs that take turns, and the line on which their times lie."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from stacked_study.programs import Case, Program, Sample

ALLOWED = 0.05


@dataclasses.dataclass(frozen=True)
class Time:
    """Of one program."""

    seconds: float
    """Median."""
    best_seconds: float
    """Minimum."""
    processor_seconds: float | None
    """Median of all cores together; None where the programs run elsewhere."""


class Line(NamedTuple):
    """a + b · n for n active blocks, through all of them and the last one alone."""

    a: float
    b: float
    deviations: dict[int, float]
    """cost / line − 1 at each depth among all layers; 0 is not on it, for it adds the embeddings to
    the blocks of depth 1."""

    @property
    def worst_depth(self) -> int:
        """Where cost and line are farthest apart, of the depths from 1 on."""
        return max((d for d in self.deviations if d), key=lambda d: abs(self.deviations[d]))

    @property
    def holds(self) -> bool:
        """Whether they are close at each of these."""
        return abs(self.deviations[self.worst_depth]) <= ALLOWED


def line_through(by_depth: Mapping[int, float]) -> Line:
    """The line of the costs at each depth among all layers."""
    num_blocks = max(by_depth) - 1
    b = (by_depth[1] - by_depth[num_blocks]) / (num_blocks - 1)
    a = by_depth[num_blocks] - b
    deviations = {
        depth: cost / (a + b * min(num_blocks + 1 - depth, num_blocks)) - 1
        for depth, cost in by_depth.items()
    }
    return Line(a, b, deviations)


def take_turns(
    programs: Mapping[Case, Program], repetitions: int, console: Console
) -> dict[Case, Time]:
    """The times of all programs, which run in another order in every round."""
    samples: dict[Case, list[Sample]] = {case: [] for case in programs}
    cases, generator = list(programs), np.random.default_rng(0)
    for _ in track(range(repetitions), "timing", console=console):
        for i in generator.permutation(len(cases)):
            samples[cases[i]].append(programs[cases[i]].run())
    on_cpu = jax.default_backend() == "cpu"
    times = {}
    for case, of_case in samples.items():
        seconds = [sample.seconds for sample in of_case]
        processor = statistics.median(sample.processor_seconds for sample in of_case)
        times[case] = Time(statistics.median(seconds), min(seconds), processor if on_cpu else None)
    return times
