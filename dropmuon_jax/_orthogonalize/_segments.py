"""Where the iteration on XXᵀ starts afresh from X, chosen by counted cost and by rounding."""

import functools
from collections.abc import Sequence

import numpy as np

from dropmuon_jax._orthogonalize._polynomials import Row

# Singular values below this part of the norm are given up by every published set of rows.
SMALLEST = 1e-3
# Rounding beyond this lets the iteration on R diverge. Measured over five shapes and five spectra
# with Polar Express: in float16 results stay in the band of the plain iteration at 0.034; in
# bfloat16 singular values end at 1.15 at 0.15, and at up to 1e11 at 0.27.
_STABLE = 0.035
# Rounding may be this part of the polynomials' error, and is then itself magnified: with five steps
# in float32 it is 0.1 of that error and moved singular values by up to 0.014.
_PART_OF_ERROR = 1 / 8
# Or this many roundoffs: about what the plain iteration loses.
_ROUNDOFFS = 100


def choose_segments(
    rows: Sequence[Row], num_rows: int, num_cols: int, roundoff: float
) -> tuple[int, ...]:
    """How many steps to take on each XXᵀ: the cheapest of what rounding allows.

    Args:
        rows: The polynomials.
        num_rows: Of each matrix, the shorter side.
        num_cols: The longer side.
        roundoff: Unit roundoff of the products.

    Returns:
        Lengths that add up to the number of rows. All ones is the plain iteration on X.
    """
    plain = (1,) * len(rows)
    longest = _longest_segments(tuple(map(tuple, rows)), roundoff)
    return min(longest, plain, key=lambda segments: count_products(segments, num_rows, num_cols))


def count_products(segments: Sequence[int], num_rows: int, num_cols: int) -> int:
    """The multiplications of all matrix products; twice as many are floating-point operations."""
    on_gram = sum(4 * length - 3 for length in segments)
    return 2 * len(segments) * num_rows**2 * num_cols + on_gram * num_rows**3


@functools.cache  # planning for a pod asks for thousands
def _longest_segments(rows: tuple[Row, ...], roundoff: float) -> tuple[int, ...]:
    """The longest segments in which rounding stays below the error of the polynomials.

    R = XXᵀ is rounded relative to its largest eigenvalue. A step multiplies its smallest ones by
    about a², and with them that error. Left alone, it makes R indefinite or pushes it out of the
    interval on which the polynomials are bounded, and they diverge.
    """
    tops, error = _tops_and_error(rows)
    tolerance = min(max(_PART_OF_ERROR * error, _ROUNDOFFS * roundoff), _STABLE)
    segments, rounding = [1], roundoff
    for (a, _, _), largest in zip(rows[:-1], tops[1:-1], strict=True):
        rounding *= a * a
        if rounding <= tolerance:
            segments[-1] += 1
        else:
            segments.append(1)
            rounding = roundoff * max(largest, 1.0) ** 2
    return tuple(segments)


def _tops_and_error(rows: Sequence[Row]) -> tuple[list[float], float]:
    """The largest singular value before each row and in the end; how far from 1 they end.

    Of those that start in [1e-3, 1]; for rows that diverge the error is 0, so that none is allowed.
    """
    x = np.geomspace(SMALLEST, 1, 2000)
    tops = [1.0]
    for a, b, c in rows:
        with np.errstate(over="ignore", invalid="ignore"):
            x = a * x + b * x**3 + c * x**5
        x = np.nan_to_num(np.abs(x), posinf=1e100).clip(max=1e100)
        tops.append(float(x.max()))
    error = float(np.abs(x - 1).max())
    return tops, error if error < 1 else 0.0
