"""Odd polynomials p(x) = ax + bx³ + cx⁵ that drive the singular values in (0, 1] towards 1."""

import math
import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dropmuon_jax._checks import check_choice, check_nonnegative, check_positive, static_int

Row = tuple[float, float, float]
Coefficients = str | Sequence[Sequence[float]]


class Polynomials(NamedTuple):
    """The steps of an iteration."""

    rows: tuple[Row, ...]
    """(a, b, c) of each step, in order."""
    start: str = "frobenius"
    """The norm by which a matrix is divided first: "frobenius", "schatten" or "aol"."""
    bounded: bool = False
    """Whether each row needs its singular values below the largest that its predecessor leaves."""

    def eased(self, roundoff: float) -> tuple[Row, ...]:
        """The rows for products of this unit roundoff.

        At the end of its interval a row is steep, and beyond it rises: five of them have the slope
        68,000 at 1, and magnify a rounding error of the norm as much. X is therefore divided by a
        little more than 1 before each step; in half precision by 1.01, as in the authors' code.
        """
        return _eased(self.rows, 1 + min(64 * roundoff, 0.01) if self.bounded else 1.0)


POLYNOMIALS = {
    # Jordan et al., 2024, https://kellerjordan.github.io/posts/muon: one row for every step.
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
    # Amsel et al., 2025, arXiv:2505.16932: polar_express_coefficients(8), where the authors round
    # the last row.
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
        start="schatten",
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
        start="aol",
    ),
}
_DEFAULT_NUM_STEPS = {"turbo_muon": 4}  # as published; of the others 5
STARTS = ("frobenius", "schatten", "aol")


def resolve_polynomials(
    coefficients: Coefficients, num_steps: int | None, start: str | None
) -> Polynomials:
    """The rows to run, one for each step.

    Args:
        coefficients: A name, whose last row is repeated where `num_steps` asks for more, or rows
            (a, b, c), each one step.
        num_steps: By default as published for a name and the number of rows for own rows, to which
            it must then be equal if given.
        start: By default as published for a name and "frobenius" for own rows.

    Raises:
        ValueError: For an unknown name or start, rows that are not (a, b, c), or a `num_steps`
            below 1.
        TypeError: If `num_steps` is no Python integer.
    """
    if num_steps is not None:
        num_steps = static_int(
            "num_steps",
            num_steps,
            minimum=1,
            hint="It is static: under optax.inject_hyperparams name it in static_args.",
        )
    if start is not None:
        check_choice("start", start, STARTS)
    if isinstance(coefficients, str):
        check_choice("coefficients", coefficients, POLYNOMIALS)
        num_steps = num_steps or _DEFAULT_NUM_STEPS.get(coefficients, 5)
        polynomials = POLYNOMIALS[coefficients]
        repeated = polynomials.rows[-1:] * (num_steps - len(polynomials.rows))
        return polynomials._replace(
            rows=(polynomials.rows + repeated)[:num_steps],
            start=start or polynomials.start,
        )
    if isinstance(coefficients, jax.Array):
        raise TypeError(
            "coefficients are static: a name or rows (a, b, c) of Python numbers, got a jax array. "
            "To orthogonalize an array, call what newton_schulz returns: dm.newton_schulz()(x)."
        )
    rows = _as_array(coefficients)
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != 3 or not np.isfinite(rows).all():
        raise ValueError(
            "coefficients must be a name or rows of three finite numbers (a, b, c), one for each "
            f"step, got {reprlib.repr(coefficients)}. For one polynomial in every step write "
            "[(a, b, c)] * num_steps."
        )
    if num_steps is not None and num_steps != len(rows):
        raise ValueError(
            f"num_steps is {num_steps}, but coefficients have {len(rows)} rows, each one step; "
            "leave num_steps out."
        )
    own = tuple((float(a), float(b), float(c)) for a, b, c in rows)
    return Polynomials(own, start=start or "frobenius")


def _as_array(coefficients: Sequence[Sequence[float]]) -> np.ndarray:
    """The rows as an array; an empty one for what is none."""
    try:
        return np.array(coefficients, dtype=float)
    except (TypeError, ValueError):  # words, or rows of different lengths
        return np.empty(0)


def polar_express_coefficients(
    num_steps: int,
    smallest: float = 1e-3,
    *,
    cushion: float = 0.02407327424182761,
    ease: float = 1.0,
) -> tuple[Row, ...]:
    r"""The rows (a, b, c) that bring the singular values in [smallest, 1] nearest to 1.

    Row t is the odd quintic with the least :math:`\max |1 - p_t|` on the interval to which its
    predecessors take [smallest, 1], found by the Remez algorithm in float64. Without a cushion no
    composition of as many odd quintics does better (Amsel et al., 2025).

    Args:
        num_steps: Number of rows, at least 1.
        smallest: The smallest singular value to care for, as a part of the matrix's norm, in
            (0, 1). Smaller ones end below the others. (By ‖M‖_F, the smallest of a matrix of
            condition 100 is at most 0.01; from `start="schatten"` it is larger.)
        cushion: The interval of a row begins at this part of its end at least, in [0, 1). Without
            one, a row takes some of the largest singular values to the smallest, where rounding
            rotates them: with five rows in float32 up to 0.14 of a singular vector was lost, and
            0.01 with the authors' cushion, the default, which costs 0.01 of error.
        ease: What X is divided by before each step, at least 1. Take 1.01 for a half-precision
            iteration, where rounding would push singular values out of the interval of a row; the
            named sets are eased by themselves.

    Returns:
        Rows to give to :func:`newton_schulz_lmo` as `coefficients`, best with
        `start="schatten"`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If `num_steps` is no Python integer.

    Examples:
        >>> import dropmuon_jax as dm
        >>> def last(x, rows):
        ...     for a, b, c in rows:
        ...         x = a * x + b * x**3 + c * x**5
        ...     return round(x, 3)
        >>> [last(x, dm.polar_express_coefficients(5)) for x in (0.001, 0.01, 1.0)]
        [0.876, 1.103, 1.124]
        >>> [last(x, dm.polar_express_coefficients(5, smallest=0.01)) for x in (0.001, 0.01, 1.0)]
        [0.28, 1.0, 1.0]

    References:
        Amsel et al., *The Polar Express*, 2025, arXiv:2505.16932, Algorithm 1 and Theorem 3.1; the
        cushion is of its authors' code.
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
    rows = []
    for _ in range(num_steps):
        row = np.array(_best_quintic(max(lower, cushion * upper), upper))
        # With a cushion the images of the true ends are not centred on 1: scale them to be.
        row *= 2 / (_quintic(row, lower) + _quintic(row, upper))
        rows.append((float(row[0]), float(row[1]), float(row[2])))
        lower = _quintic(row, lower)
        upper = 2 - lower
    return _eased(rows, ease)


def _eased(rows: Sequence[Row], ease: float) -> tuple[Row, ...]:
    """p(x / ease) of each row p."""
    return tuple((a / ease, b / ease**3, c / ease**5) for a, b, c in rows)


def _quintic(row: Sequence[float] | np.ndarray, x: float) -> float:
    a, b, c = row
    return float(x * (a + x**2 * (b + x**2 * c)))


def _best_quintic(lower: float, upper: float) -> Row:
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
