"""Odd polynomials p(x) = ax + bx³ + cx⁵ + …, one a step, and what a step costs and rounds."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

OddPolynomial = tuple[float, ...]  # (a, b, c, …) of x, x³, x⁵, …


class Polynomials(NamedTuple):
    """The polynomials of an iteration, one for each step."""

    coefficients: tuple[OddPolynomial, ...]
    """The (a, b, c, …) of each step, in order."""
    preconditioning: str = "frobenius"
    """The norm by which a matrix is divided first: "frobenius", "schatten" or "aol"."""
    bounded: bool = False
    """Whether a step needs its singular values below the largest that its predecessor leaves."""

    def eased(self, roundoff: float) -> tuple[OddPolynomial, ...]:
        """The coefficients for products of this unit roundoff.

        A bounded polynomial is steep at the end of its interval and rises beyond it, so that a
        composition of five magnifies a rounding error of the norm 68,000 times. X is therefore
        divided by a little more than 1 before each step: in half precision by 1.01, as in the code
        of Polar Express's authors.
        """
        return eased(self.coefficients, 1 + min(64 * roundoff, 0.01) if self.bounded else 1.0)


def eased(coefficients: Sequence[OddPolynomial], ease: float) -> tuple[OddPolynomial, ...]:
    """The coefficients of p(x / ease), of each polynomial p."""
    return tuple(
        tuple(c / ease ** (2 * i + 1) for i, c in enumerate(step)) for step in coefficients
    )


def evaluate(polynomial: Sequence[float] | np.ndarray, x: Any) -> Any:
    """p(x), of a number or an array."""
    return x * np.polynomial.polynomial.polyval(x * x, polynomial)


# --- Segments: after how many steps on the small R = XXᵀ the iteration goes back to X -------------

# Every published set gives up singular values below this part of the norm.
_SMALLEST = 1e-3
# Rounding beyond this lets the iteration on R diverge. Measured over five shapes and five spectra
# with Polar Express: in float16 results stay in the band of the plain iteration at 0.034; in
# bfloat16 singular values end at 1.15 at 0.15, and at up to 1e11 at 0.27.
_STABLE = 0.035
# Rounding may be this part of the polynomials' error, and is then itself magnified: with five steps
# in float32 it is 0.1 of that error and moved singular values by up to 0.014.
_PART_OF_ERROR = 1 / 8
# Or this many roundoffs: about what the plain iteration loses.
_ROUNDOFFS = 100
# A product takes the time of so many multiplications more, which matters for lone 16 × 32 matrices.
_CALL = 2**14


def choose_segments(
    coefficients: Sequence[OddPolynomial], num_rows: int, num_cols: int, roundoff: float
) -> tuple[int, ...]:
    """The numbers of steps on each XXᵀ, the cheapest that rounding allows; their sum is all steps.

    The shorter side of a matrix is `num_rows`, and `roundoff` is that of the products. All ones is
    the plain iteration on X.
    """
    plain = (1,) * len(coefficients)
    longest = _longest_segments(tuple(map(tuple, coefficients)), roundoff)

    def cost(segments: tuple[int, ...]) -> int:
        calls = 2 * len(segments) + _products_on_gram(coefficients, segments)
        return count_products(coefficients, segments, num_rows, num_cols) + _CALL * calls

    return min(longest, plain, key=cost)


def count_products(
    coefficients: Sequence[OddPolynomial], segments: Sequence[int], num_rows: int, num_cols: int
) -> int:
    """The multiplications in all matrix products; twice as many are floating-point operations."""
    on_gram = _products_on_gram(coefficients, segments)
    return 2 * len(segments) * num_rows**2 * num_cols + on_gram * num_rows**3


def _products_on_gram(coefficients: Sequence[OddPolynomial], segments: Sequence[int]) -> int:
    """Those of R in each H, and QH and RHH between two steps."""
    in_h = sum(
        (len(first) > 2) + (second is not None) for first, second in map(factors, coefficients)
    )
    return in_h + 3 * (len(coefficients) - len(segments))


def factors(polynomial: OddPolynomial) -> tuple[OddPolynomial, OddPolynomial | None]:
    """Polynomials in r of degree 2 at most, whose product is h(r) = a + br + cr² + dr³ + er⁴.

    With R² they need one more product of matrices, as any form of h does. Summed up term by term,
    terms of up to 621 would cancel to about 1 in the first step of "nonic", and magnify rounding.
    """
    polynomial = tuple(np.trim_zeros(polynomial, "b"))
    if len(polynomial) <= 3:
        return polynomial, None
    # The two roots that are nearest to each other, such as a complex pair, belong together.
    roots = list(np.roots(polynomial[::-1]))
    pairs = [(abs(x - y.conj()), i, j) for i, x in enumerate(roots) for j, y in enumerate(roots)]
    _, i, j = min(pair for pair in pairs if pair[1] < pair[2])
    rest = [root for k, root in enumerate(roots) if k not in (i, j)]
    scale = abs(polynomial[-1]) ** 0.5
    first = scale * np.poly([roots[i], roots[j]]).real
    second = polynomial[-1] / scale * np.poly(rest).real
    return tuple(map(float, first[::-1])), tuple(map(float, second[::-1]))


@functools.cache  # planning for a pod asks for thousands
def _longest_segments(coefficients: tuple[OddPolynomial, ...], roundoff: float) -> tuple[int, ...]:
    """The longest segments in which rounding stays below the error of the polynomials.

    R = XXᵀ is rounded relative to its largest eigenvalue. A step multiplies its smallest ones by
    about a², and that error with them. Left alone, the error makes R indefinite or pushes it out of
    the interval on which the polynomials are bounded, and they diverge.
    """
    tops, error = _tops_and_error(coefficients)
    tolerance = min(max(_PART_OF_ERROR * error, _ROUNDOFFS * roundoff), _STABLE)
    segments, rounding = [1], roundoff
    for (a, *_), largest in zip(coefficients[:-1], tops[1:-1], strict=True):
        rounding *= a * a
        if rounding <= tolerance:
            segments[-1] += 1
        else:
            segments.append(1)
            rounding = roundoff * max(largest, 1.0) ** 2
    return tuple(segments)


def _tops_and_error(coefficients: Sequence[OddPolynomial]) -> tuple[list[float], float]:
    """The largest singular value before each step and at the end, and how far from 1 they end.

    The singular values start in [1e-3, 1]. Polynomials that diverge get the error 0, which allows
    no rounding.
    """
    x = np.geomspace(_SMALLEST, 1, 2000)
    tops = [1.0]
    for step in coefficients:
        with np.errstate(over="ignore", invalid="ignore"):
            x = evaluate(step, x)
        x = np.nan_to_num(np.abs(x), posinf=1e100).clip(max=1e100)
        tops.append(float(x.max()))
    error = float(np.abs(x - 1).max())
    return tops, error if error < 1 else 0.0
