"""Slopes in the logarithms, with confidence intervals."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

_RESAMPLES = 1000
_POINTS_PER_DECADE = 10


@dataclasses.dataclass(frozen=True)
class Slope:
    """The exponent of K, with the 95 % interval of a bootstrap over seeds."""

    value: float
    low: float
    high: float


def horizons(horizon: int, measure_every: int, decades: float) -> Int[np.ndarray, " horizons"]:
    """Those of the last decades, ten a decade, multiples of `measure_every`."""
    last = horizon // measure_every
    first = max(last / 10**decades, 2)
    num = max(round(_POINTS_PER_DECADE * np.log10(last / first)) + 1, 3)
    return np.unique(np.geomspace(first, last, num).round().astype(int)) * measure_every


def running_average(
    measured: Float[np.ndarray, "... measurements"],
) -> Float[np.ndarray, "... measurements"]:
    """The mean of all measurements so far."""
    return measured.cumsum(-1) / np.arange(1, measured.shape[-1] + 1)


def late_average(
    measured: Float[np.ndarray, "... measurements"],
) -> Float[np.ndarray, "... measurements"]:
    """The mean of the later half of the measurements so far: without the way from the start."""
    total = np.concatenate([np.zeros_like(measured[..., :1]), measured.cumsum(-1)], -1)
    ends = np.arange(1, measured.shape[-1] + 1)
    starts = ends // 2
    return (total[..., ends] - total[..., starts]) / (ends - starts)


def fit_slope(
    at: Int[np.ndarray, " horizons"],
    values: Float[np.ndarray, "seeds horizons"],
    seed: int = 0,
) -> Slope:
    """Least squares of the logarithm of the mean over seeds against log K."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile([_slope(at, values[rows]) for rows in drawn], [2.5, 97.5])
    return Slope(_slope(at, values), float(low), float(high))


def _slope(at: np.ndarray, values: np.ndarray) -> float:
    return float(np.polyfit(np.log(at), np.log(values.mean(0)), 1)[0])
