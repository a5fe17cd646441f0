"""Methods take turns on one list of leaves; times are compared within each round."""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from orthogonalization.compiled_programs import Program, compile_program
from orthogonalization.matrix_products import ProductRates
from orthogonalization.orthogonalizers import REFERENCE, MethodName
from orthogonalization.shape_lists import Shape, make_leaves, matrix_shape

MIN_REPETITIONS = 3
RATE_TIME = 0.1  # of the method's own time goes into measuring the machine's rate before it
MIN_SAMPLE_SECONDS = 0.05  # shorter calls are repeated and averaged, against the noise of the clock


@dataclasses.dataclass(frozen=True)
class Timing:
    """A method on a list, with one entry for each round."""

    method: MethodName
    program: Program
    seconds: list[float]
    speed_ups: list[float]
    """The time of optax.contrib.muon in the same round, in this method's."""
    shares: list[float]
    """The time of the method's matrix products at the machine's rate, in the method's whole time.
    The rate is that of the dtype in which it multiplies, measured just before; NaN where products
    cannot be counted. Above 1 where others slowed the machine just then, or where the method's
    products suit it better than the square ones that are measured."""

    @property
    def speed_up(self) -> float:
        """The median."""
        return statistics.median(self.speed_ups)

    @property
    def share(self) -> float:
        """The median."""
        return statistics.median(self.shares)


@dataclasses.dataclass(frozen=True)
class ListTimings:
    """All methods on one list."""

    name: str
    shapes: tuple[Shape, ...]
    timings: list[Timing]
    not_timed: dict[MethodName, str]
    """And why not."""

    def of(self, method: MethodName) -> Timing | None:
        """One method's, None if it was not timed."""
        return next((timing for timing in self.timings if timing.method == method), None)


def time_list(
    name: str,
    shapes: tuple[Shape, ...],
    methods: Sequence[MethodName],
    *,
    not_timed: dict[MethodName, str],
    dtype: str,
    num_steps: int | None,
    repetitions: int,
    max_seconds: float,
    rates: ProductRates,
    console: Console,
) -> ListTimings:
    """Every method that is to be timed once a round, in rotated order, until rounds or time are up.

    Args:
        name: Of the list.
        shapes: Of its leaves.
        methods: Who takes part.
        not_timed: Which of them are left out here, and why.
        dtype: Of the leaves.
        num_steps: Of the iterations, None for each method's own.
        repetitions: Number of rounds.
        max_seconds: No new round after so long, once there are 3.
        rates: Measures the machine.
        console: For progress bars.
    """
    methods = [method for method in methods if method not in not_timed]
    programs = {
        method: compile_program(method, shapes, dtype, num_steps)
        for method in track(methods, f"{name}: compiling", console=console)
    }
    leaves = make_leaves(shapes, dtype)
    warm = {
        method: _seconds(programs[method], leaves, 1)
        for method in track(methods, f"{name}: warming up", console=console)
    }
    num_calls = {method: math.ceil(MIN_SAMPLE_SECONDS / warm[method]) for method in methods}
    seconds: dict[MethodName, list[float]] = {method: [] for method in methods}
    shares: dict[MethodName, list[float]] = {method: [] for method in methods}
    started = time.perf_counter()
    for repetition in track(range(repetitions), f"{name}: timing", console=console):
        if repetition >= MIN_REPETITIONS and time.perf_counter() - started > max_seconds:
            break
        first = repetition % len(methods)
        for method in (*methods[first:], *methods[:first]):
            program = programs[method]
            at_full_rate = math.fsum(
                flops / rates.measure(factors, RATE_TIME * num_calls[method] * warm[method])
                for factors, flops in program.product_flops.items()
            )
            seconds[method].append(_seconds(program, leaves, num_calls[method]))
            shares[method].append(at_full_rate / seconds[method][-1])
    timings = [
        Timing(
            method,
            programs[method],
            seconds[method],
            [theirs / own for theirs, own in zip(seconds[REFERENCE], seconds[method], strict=True)],
            shares[method],
        )
        for method in methods
    ]
    return ListTimings(name, shapes, timings, not_timed)


def svd_cost(shapes: Sequence[Shape]) -> int:
    """Σ rows · cols · min(rows, cols), to which the time of an SVD is about proportional."""
    return sum(math.prod(matrix_shape(shape)) * min(matrix_shape(shape)) for shape in shapes)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; of a single value that value."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def _seconds(program: Program, leaves: list[Any], num_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(num_calls):
        jax.block_until_ready(program.compiled(leaves))
    return (time.perf_counter() - start) / num_calls
