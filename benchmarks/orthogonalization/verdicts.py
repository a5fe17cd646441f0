"""What was measured of the orthogonalizations, summed up, and held against the targets."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from orthogonalization.compiled_programs import Program
from orthogonalization.list_timing import ListTimings
from orthogonalization.orthogonalizers import DEFAULT, REFERENCE, MethodName
from orthogonalization.polar_errors import GAIN_CONDITION, Accuracy, largest_error_ratio
from orthogonalization.shape_lists import LARGE_LISTS, Shape

SPEED_UP = 2.0
SHARE = 0.8
PROGRAM_GROWTH = 1.2
BAND = (0.85, 1.13)
MEMORY_LIMIT = 2**28  # in bytes, newton_schulz_lmo's default


class ProgramSize(NamedTuple):
    """A method compiled for equal leaves."""

    shape: Shape
    leaves: int
    method: MethodName
    program: Program


class Measurements(NamedTuple):
    """Everything that the benchmark measures."""

    lists: list[ListTimings]
    sizes: list[ProgramSize]
    accuracies: list[Accuracy]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The speed-up of a method over lists."""

    method: MethodName
    num_lists: int
    geometric_mean: float
    slowest_list: str
    slowest: float


@dataclasses.dataclass(frozen=True)
class Target:
    """One that was asked for."""

    sentence: str
    found: str
    met: bool | None
    """None where nothing measured says so."""


def summarise(lists: Sequence[ListTimings], method: MethodName) -> Summary | None:
    """The geometric mean of the medians, None for a method that was timed nowhere."""
    speed_ups = {
        timings.name: timing.speed_up for timings in lists if (timing := timings.of(method))
    }
    if not speed_ups:
        return None
    slowest = min(speed_ups, key=lambda name: speed_ups[name])
    return Summary(
        method,
        len(speed_ups),
        statistics.geometric_mean(speed_ups.values()),
        slowest,
        speed_ups[slowest],
    )


def gain_band(accuracies: Sequence[Accuracy], method: MethodName) -> tuple[float, float]:
    """Smallest and largest gain at conditions up to 1e3; NaN if a result was not finite."""
    judged = [a for a in accuracies if a.method == method and a.condition <= GAIN_CONDITION]
    if not judged or any(math.isnan(a.error) for a in judged):
        return math.nan, math.nan
    return min(a.smallest_gain for a in judged), max(a.largest_gain for a in judged)


def within_band(gains: tuple[float, float]) -> bool:
    """Whether the promised band is kept; not by NaN."""
    return BAND[0] <= gains[0] and gains[1] <= BAND[1]


def program_growth(sizes: Sequence[ProgramSize], shape: Shape, method: MethodName) -> float:
    """The HLO of most leaves of a shape in that of fewest."""
    own = [size for size in sizes if (size.shape, size.method) == (shape, method)]
    fewest, most = min(own, key=lambda size: size.leaves), max(own, key=lambda size: size.leaves)
    return most.program.hlo_bytes / fewest.program.hlo_bytes


def judge(measurements: Measurements) -> list[Target]:
    """Every target, for this package as it comes."""
    lists, sizes, accuracies = measurements
    own = {timings.name: timing for timings in lists if (timing := timings.of(DEFAULT))}
    return [
        *_judge_speed(lists, accuracies),
        _judge_share({name: own[name].share for name in LARGE_LISTS if name in own}),
        _judge_growth(sizes),
        _judge_memory({name: timing.program.temporary_bytes for name, timing in own.items()}),
        _judge_band(accuracies),
    ]


def _judge_speed(lists: Sequence[ListTimings], accuracies: Sequence[Accuracy]) -> list[Target]:
    summary = summarise(lists, DEFAULT)
    assert summary is not None
    ratio = largest_error_ratio(accuracies, DEFAULT, REFERENCE)
    return [
        Target(
            f"≥ {SPEED_UP:g} × as fast as optax.contrib.muon at no larger error",
            f"{summary.geometric_mean:.2f} × in the geometric mean, error at most {ratio:.2f} ×",
            summary.geometric_mean >= SPEED_UP and ratio <= 1,
        ),
        Target(
            "Nowhere slower",
            f"{summary.slowest:.2f} × on {summary.slowest_list}",
            summary.slowest >= 1,
        ),
    ]


def _judge_share(shares: Mapping[str, float]) -> Target:
    """Met only if all large lists are there; one is enough to miss it."""
    sentence = f"≥ {SHARE:.0%} of the matrix-product rate on {' and '.join(LARGE_LISTS)}"
    if not shares:
        return Target(sentence, "neither was timed", None)
    lowest = min(shares, key=lambda name: shares[name])
    met = shares[lowest] >= SHARE
    complete = len(shares) == len(LARGE_LISTS)
    return Target(
        sentence, f"{shares[lowest]:.0%} on {lowest}", met if complete or not met else None
    )


def _judge_growth(sizes: Sequence[ProgramSize]) -> Target:
    growths = {size.shape: program_growth(sizes, size.shape, DEFAULT) for size in sizes}
    largest = max(growths, key=lambda shape: growths[shape])
    counts = [size.leaves for size in sizes]
    return Target(
        f"HLO of {max(counts)} leaves ≤ {PROGRAM_GROWTH:g} × that of {min(counts)}",
        f"{growths[largest]:.2f} × for {'x'.join(map(str, largest))}",
        growths[largest] <= PROGRAM_GROWTH if max(counts) > min(counts) else None,
    )


def _judge_memory(memory: Mapping[str, int]) -> Target:
    hungriest = max(memory, key=lambda name: memory[name])
    return Target(
        f"Temporary memory ≤ the default limit of {MEMORY_LIMIT // 2**20} MiB",
        f"{memory[hungriest] / 2**20:.1f} MiB on {hungriest}",
        memory[hungriest] <= MEMORY_LIMIT,
    )


def _judge_band(accuracies: Sequence[Accuracy]) -> Target:
    sentence = f"Singular values ≥ 1e-3 of the norm to [{BAND[0]}, {BAND[1]}]"
    if all(accuracy.condition > GAIN_CONDITION for accuracy in accuracies):
        return Target(sentence, f"no condition ≤ {GAIN_CONDITION:g} was measured", None)
    smallest, largest = gain_band(accuracies, DEFAULT)
    return Target(
        sentence,
        f"[{smallest:.3f}, {largest:.3f}] up to condition {GAIN_CONDITION:g}",
        within_band((smallest, largest)),
    )
