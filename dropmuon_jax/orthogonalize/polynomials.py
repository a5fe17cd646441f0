"""Odd polynomials p(x) = ax + bx³ + cx⁵ that drive the singular values in (0, 1] towards 1."""

import functools
import math
import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dropmuon_jax._checks import check_choice, check_nonnegative, check_positive, static_int

Quintic = tuple[float, float, float]
Coefficients = str | Sequence[Sequence[float]]


class Polynomials(NamedTuple):
    """The polynomials of an iteration, one for each step."""

    coefficients: tuple[Quintic, ...]
    """The (a, b, c) of each step, in order."""
    preconditioning: str = "frobenius"
    """The norm by which a matrix is divided first: "frobenius", "schatten" or "aol"."""
    bounded: bool = False
    """Whether a step needs its singular values below the largest that its predecessor leaves."""

    def eased(self, roundoff: float) -> tuple[Quintic, ...]:
        """The coefficients for products of this unit roundoff.

        A bounded polynomial is steep at the end of its interval and rises beyond it, so that a
        composition of five magnifies a rounding error of the norm 68,000 times. X is therefore
        divided by a little more than 1 before each step: in half precision by 1.01, as in the code
        of Polar Express's authors.
        """
        return _eased(self.coefficients, 1 + min(64 * roundoff, 0.01) if self.bounded else 1.0)


POLYNOMIALS = {
    # Jordan et al., 2024, https://kellerjordan.github.io/posts/muon: the same in every step.
    "muon": Polynomials(((3.4445, -4.7750, 2.0315),)),
    # You, 2025, in the Dion repository (Ahn et al., 2025, arXiv:2504.05295).
    "dion": Polynomials(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # Amsel et al., 2025, arXiv:2505.16932: polar_express_coefficients(8), the last ones rounded.
    "polar_express": Polynomials(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        preconditioning="schatten",
        bounded=True,
    ),
    # Boissin et al., 2025 (Turbo-Muon), arXiv:2512.04632.
    "turbo_muon": Polynomials(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        preconditioning="aol",
    ),
}
_DEFAULT_NUM_STEPS = {"turbo_muon": 4}  # as published; the others have 5
PRECONDITIONINGS = ("frobenius", "schatten", "aol")


def resolve_polynomials(
    coefficients: Coefficients, num_steps: int | None, preconditioning: str | None
) -> Polynomials:
    """The polynomials that the arguments of :func:`newton_schulz` name, one for each step."""
    if num_steps is not None:
        num_steps = static_int(
            "num_steps",
            num_steps,
            minimum=1,
            hint="It is static: under optax.inject_hyperparams name it in static_args.",
        )
    if preconditioning is not None:
        check_choice("preconditioning", preconditioning, PRECONDITIONINGS)
    if isinstance(coefficients, str):
        check_choice("coefficients", coefficients, POLYNOMIALS)
        num_steps = num_steps or _DEFAULT_NUM_STEPS.get(coefficients, 5)
        named = POLYNOMIALS[coefficients]
        repeated = named.coefficients[-1:] * (num_steps - len(named.coefficients))
        return named._replace(
            coefficients=(named.coefficients + repeated)[:num_steps],
            preconditioning=preconditioning or named.preconditioning,
        )
    if isinstance(coefficients, jax.Array):
        raise TypeError(
            "coefficients are static: a name or triples (a, b, c) of Python numbers, got a jax "
            "array. To orthogonalize an array, call what newton_schulz returns: "
            "dm.orthogonalize.newton_schulz()(x)."
        )
    try:
        own = np.array(coefficients, dtype=float)
    except (TypeError, ValueError):  # words, or tuples of different lengths
        own = np.empty((0, 0))
    if own.ndim != 2 or own.shape[0] < 1 or own.shape[1] != 3 or not np.isfinite(own).all():
        raise ValueError(
            "coefficients must be a name or triples of finite numbers (a, b, c), one for each "
            f"step, got {reprlib.repr(coefficients)}. For one polynomial in every step write "
            "[(a, b, c)] * num_steps."
        )
    if num_steps is not None and num_steps != len(own):
        raise ValueError(
            f"num_steps is {num_steps}, but the number of coefficients (a, b, c) is {len(own)}, "
            "each for one step; leave num_steps out."
        )
    triples = tuple((float(a), float(b), float(c)) for a, b, c in own)
    return Polynomials(triples, preconditioning=preconditioning or "frobenius")


def polar_express_coefficients(
    num_steps: int,
    smallest: float = 1e-3,
    *,
    cushion: float = 0.02407327424182761,
    ease: float = 1.0,
) -> tuple[Quintic, ...]:
    r"""The coefficients (a, b, c) that bring the singular values in [smallest, 1] nearest to 1.

    Step t has the odd quintic with the least :math:`\max |1 - p_t|` on the interval to which its
    predecessors take [smallest, 1], found by the Remez algorithm in float64. Without a cushion no
    composition of as many odd quintics does better (Amsel et al., 2025).

    Args:
        num_steps: Number of polynomials, at least 1.
        smallest: The smallest singular value to care for, as a part of the matrix's norm, in
            (0, 1). Smaller ones end below the others. (Of ‖M‖_F, the smallest of a matrix of
            condition 100 is at most 0.01; of the norm of `preconditioning="schatten"` it is more.)
        cushion: Each interval is taken to begin at this part of its end at least, in [0, 1).
            Without a cushion, a step takes some of the largest singular values to the smallest,
            where rounding rotates their vectors. The default is the authors'.
        ease: What X is divided by before each step, at least 1. Take 1.01 for a half-precision
            iteration, where rounding would push singular values out of the next interval; the
            named sets are eased by themselves.

    Returns:
        What :func:`newton_schulz_lmo` takes as `coefficients`, best with
        `preconditioning="schatten"`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If `num_steps` is no Python integer.

    Examples:
        >>> import dropmuon_jax as dm
        >>> def last(x, coefficients):
        ...     for a, b, c in coefficients:
        ...         x = a * x + b * x**3 + c * x**5
        ...     return round(x, 3)
        >>> five = dm.orthogonalize.polar_express_coefficients(5)
        >>> [last(x, five) for x in (0.001, 0.01, 1.0)]
        [0.876, 1.103, 1.124]
        >>> five = dm.orthogonalize.polar_express_coefficients(5, smallest=0.01)
        >>> [last(x, five) for x in (0.001, 0.01, 1.0)]
        [0.28, 1.0, 1.0]

    References:
        Amsel et al., *The Polar Express*, 2025, arXiv:2505.16932, Algorithm 1 and Theorem 3.1; the
        cushion is in its authors' code.
    """
    num_steps = static_int("num_steps", num_steps, minimum=1)
    for name, value in (("smallest", smallest), ("cushion", cushion)):
        check_nonnegative(name, value)
    if not 0 < smallest < 1:
        raise ValueError(f"smallest must lie in (0, 1), got {smallest}.")
    if not 0 <= cushion < 1:
        raise ValueError(f"cushion must lie in [0, 1), got {cushion}.")
    check_positive("ease", ease)
    if ease < 1:
        raise ValueError(f"ease must be at least 1, got {ease}.")
    lower, upper = smallest, 1.0
    coefficients = []
    for _ in range(num_steps):
        best = np.array(_best_quintic(max(lower, cushion * upper), upper))
        # With a cushion the images of the true ends are not centred on 1: scale them so.
        best *= 2 / (_quintic(best, lower) + _quintic(best, upper))
        coefficients.append((float(best[0]), float(best[1]), float(best[2])))
        lower = _quintic(best, lower)
        upper = 2 - lower
    return _eased(coefficients, ease)


def _eased(coefficients: Sequence[Quintic], ease: float) -> tuple[Quintic, ...]:
    """The coefficients of p(x / ease), of each polynomial p."""
    return tuple((a / ease, b / ease**3, c / ease**5) for a, b, c in coefficients)


def _quintic(coefficients: Sequence[float] | np.ndarray, x: float) -> float:
    a, b, c = coefficients
    return float(x * (a + x**2 * (b + x**2 * c)))


def _best_quintic(lower: float, upper: float) -> Quintic:
    """The odd quintic nearest to 1 on an interval, by Remez's exchange."""
    if lower > (1 - 5e-6) * upper:  # to rounding the limit, Newton-Schulz's own quintic
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    inner = np.array([(3 * lower + upper) / 4, (lower + 3 * upper) / 4])
    a, b, c, error = 0.0, 0.0, 0.0, math.inf
    for _ in range(100):
        # The error alternates between its extremes at four points.
        x = np.array([lower, *inner, upper])
        system = np.stack([x, x**3, x**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4))
        if abs(new_error - error) < 1e-15:
            break
        error = new_error
        # The inner extremes, where a + 3bx² + 5cx⁴ = 0.
        root = np.sqrt(9 * b**2 - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return a, b, c


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


def choose_segments(
    coefficients: Sequence[Quintic], num_rows: int, num_cols: int, roundoff: float
) -> tuple[int, ...]:
    """The numbers of steps on each XXᵀ, the cheapest that rounding allows; their sum is all steps.

    The shorter side of a matrix is `num_rows`, and `roundoff` is that of the products. All ones is
    the plain iteration on X.
    """
    plain = (1,) * len(coefficients)
    longest = _longest_segments(tuple(map(tuple, coefficients)), roundoff)
    return min(longest, plain, key=lambda segments: count_products(segments, num_rows, num_cols))


def count_products(segments: Sequence[int], num_rows: int, num_cols: int) -> int:
    """The multiplications in all matrix products; twice as many are floating-point operations."""
    on_gram = sum(4 * length - 3 for length in segments)
    return 2 * len(segments) * num_rows**2 * num_cols + on_gram * num_rows**3


@functools.cache  # planning for a pod asks for thousands
def _longest_segments(coefficients: tuple[Quintic, ...], roundoff: float) -> tuple[int, ...]:
    """The longest segments in which rounding stays below the error of the polynomials.

    R = XXᵀ is rounded relative to its largest eigenvalue. A step multiplies its smallest ones by
    about a², and that error with them. Left alone, the error makes R indefinite or pushes it out of
    the interval on which the polynomials are bounded, and they diverge.
    """
    tops, error = _tops_and_error(coefficients)
    tolerance = min(max(_PART_OF_ERROR * error, _ROUNDOFFS * roundoff), _STABLE)
    segments, rounding = [1], roundoff
    for (a, _, _), largest in zip(coefficients[:-1], tops[1:-1], strict=True):
        rounding *= a * a
        if rounding <= tolerance:
            segments[-1] += 1
        else:
            segments.append(1)
            rounding = roundoff * max(largest, 1.0) ** 2
    return tuple(segments)


def _tops_and_error(coefficients: Sequence[Quintic]) -> tuple[list[float], float]:
    """The largest singular value before each step and at the end, and how far from 1 they end.

    The singular values start in [1e-3, 1]. Polynomials that diverge get the error 0, which allows
    no rounding.
    """
    x = np.geomspace(_SMALLEST, 1, 2000)
    tops = [1.0]
    for a, b, c in coefficients:
        with np.errstate(over="ignore", invalid="ignore"):
            x = a * x + b * x**3 + c * x**5
        x = np.nan_to_num(np.abs(x), posinf=1e100).clip(max=1e100)
        tops.append(float(x.max()))
    error = float(np.abs(x - 1).max())
    return tops, error if error < 1 else 0.0
