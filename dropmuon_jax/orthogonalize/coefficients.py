"""What the arguments of `newton_schulz` stand for: named coefficients, your own, Remez's."""

import math
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dropmuon_jax._checks import check_choice, check_nonnegative, check_positive, static_int
from dropmuon_jax.orthogonalize.polynomials import OddPolynomial, Polynomials, eased, evaluate

Coefficients = str | Sequence[Sequence[float]]
DTYPES = ("float32", "bfloat16", "float16")
NUMBERS = (2, 3, 4, 5)  # of coefficients, for the degrees 3, 5, 7 and 9

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
    # polar_express_coefficients(4, 2.5e-3, degree=9, cushion=0). Three steps take as many products
    # as four of degree 5, and end as near to the polar factor as five of "muon".
    "nonic": Polynomials(
        (
            (
                14.868798896986,
                -145.350384210337,
                483.446632569039,
                -621.260724573019,
                270.258507591141,
            ),
            (6.579666211111, -15.837649959218, 13.457750163268, -4.454502373535, 0.500691144256),
            (3.869667599561, -7.786095747538, 7.119625390378, -2.724997655559, 0.365015974202),
            (2.497362469366, -3.393830825072, 3.07088623917, -1.450658181875, 0.276224627361),
        ),
        preconditioning="schatten",
        bounded=True,
    ),
}
_DEFAULT_NUM_STEPS = {"turbo_muon": 4, "nonic": 3}  # the others have 5
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
            "coefficients are static: a name or tuples (a, b, c) of Python numbers, got a jax "
            "array. To orthogonalize an array, call what newton_schulz returns: "
            "dm.orthogonalize.newton_schulz()(x)."
        )
    own = _own_polynomials(coefficients)
    if num_steps is not None and num_steps != len(own):
        raise ValueError(
            f"num_steps is {num_steps}, but the number of coefficients (a, b, c) is {len(own)}, "
            "each for one step; leave num_steps out."
        )
    return Polynomials(own, preconditioning=preconditioning or "frobenius")


def _own_polynomials(coefficients: Sequence[Sequence[float]]) -> tuple[OddPolynomial, ...]:
    """Each of them, of a degree that a step can take; an error that says what is wrong."""
    try:
        own = [np.array(step, dtype=float) for step in coefficients]
    except (TypeError, ValueError):  # words, or what is no sequence
        own = []
    if not own or not all(
        step.ndim == 1 and len(step) in NUMBERS and np.isfinite(step).all() for step in own
    ):
        raise ValueError(
            "coefficients must be a name or tuples of finite numbers, one for each step: (a, b, c) "
            "of ax + bx³ + cx⁵, or two, four or five numbers for another degree, got "
            f"{reprlib.repr(coefficients)}. For one polynomial in every step write "
            "[(a, b, c)] * num_steps."
        )
    return tuple(tuple(map(float, step)) for step in own)


def polar_express_coefficients(
    num_steps: int,
    smallest: float = 1e-3,
    *,
    degree: int = 5,
    cushion: float = 0.02407327424182761,
    ease: float = 1.0,
) -> tuple[OddPolynomial, ...]:
    r"""The coefficients (a, b, c, …) that bring singular values in [smallest, 1] nearest to 1.

    Step t has the odd polynomial with the least :math:`\max |1 - p_t|` on the interval to which
    its predecessors take [smallest, 1], found by the Remez algorithm in float64. Without a cushion
    no composition of as many odd polynomials of the degree does better (Amsel et al., 2025).

    Args:
        num_steps: Number of polynomials, at least 1.
        smallest: The smallest singular value to care for, as a part of the matrix's norm, in
            (0, 1). Smaller ones end below the others. (Of ‖M‖_F, the smallest of a matrix of
            condition 100 is at most 0.01; of the norm of `preconditioning="schatten"` it is more.)
        degree: Of each polynomial: 5 or 9. A step of degree 5 takes three products of a
            square matrix, and one of degree 9 four: three of degree 9 are as many as four of
            degree 5, with a smaller error.
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
        TypeError: If `num_steps` or `degree` is no Python integer.

    Examples:
        >>> import dropmuon_jax as dm
        >>> def last(x, coefficients):
        ...     for step in coefficients:
        ...         x = sum(c * x ** (2 * i + 1) for i, c in enumerate(step))
        ...     return round(x, 3)
        >>> five = dm.orthogonalize.polar_express_coefficients(5)
        >>> [last(x, five) for x in (0.001, 0.01, 1.0)]
        [0.876, 1.103, 1.124]
        >>> five = dm.orthogonalize.polar_express_coefficients(5, smallest=0.01)
        >>> [last(x, five) for x in (0.001, 0.01, 1.0)]
        [0.28, 1.0, 1.0]
        >>> three = dm.orthogonalize.polar_express_coefficients(3, smallest=0.01, degree=9)
        >>> [last(x, three) for x in (0.001, 0.01, 1.0)]
        [0.175, 0.997, 1.003]

    References:
        Amsel et al., *The Polar Express*, 2025, arXiv:2505.16932, Algorithm 1 and Theorem 3.1; the
        cushion is in its authors' code.
    """
    num_steps = static_int("num_steps", num_steps, minimum=1)
    degree = static_int("degree", degree, minimum=1)
    if degree not in (5, 9):
        raise ValueError(f"degree must be 5 or 9, got {degree}.")
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
        best = _nearest_to_one(degree, max(lower, cushion * upper), upper)
        # With a cushion the images of the true ends are not centred on 1: scale them so.
        best *= 2 / (evaluate(best, lower) + evaluate(best, upper))
        coefficients.append(tuple(map(float, best)))
        lower = evaluate(best, lower)
        upper = 2 - lower
    return eased(coefficients, ease)


def _nearest_to_one(degree: int, lower: float, upper: float) -> np.ndarray:
    """The odd polynomial nearest to 1 on an interval, by Remez's exchange."""
    powers = np.arange(1, degree + 1, 2)
    if lower > (1 - 5e-6) * upper:  # to rounding the limit, Newton-Schulz's own
        return _newton_schulz(degree) / upper**powers
    # The error alternates between its extremes at one point more than there are coefficients.
    angles = np.pi * np.arange(len(powers) + 1) / len(powers)
    x = (lower + upper) / 2 - (upper - lower) / 2 * np.cos(angles)
    signs = (-1.0) ** np.arange(len(x))
    best, error = np.zeros(len(powers)), math.inf
    for _ in range(100):
        system = np.column_stack([x[:, None] ** powers, signs])
        *best, new_error = np.linalg.solve(system, np.ones(len(x)))
        if abs(new_error - error) < 1e-15:
            break
        error = new_error
        # The inner extremes, where a + 3bx² + 5cx⁴ + … = 0.
        roots = np.roots((best * powers)[::-1]).real
        x[1:-1] = np.sqrt(np.sort(roots))
    return np.array(best)


def _newton_schulz(degree: int) -> np.ndarray:
    """The coefficients of x times the series of 1/√r around 1 in r = x², up to the degree."""
    series, term = np.zeros(1), np.ones(1)
    for k in range((degree + 1) // 2):
        series = np.polynomial.polynomial.polyadd(series, term)
        # The next term is (2k + 1) / (2k + 2) · (1 - r) times this one.
        term = np.polynomial.polynomial.polymul(term, [1, -1]) * (2 * k + 1) / (2 * k + 2)
    return series


def resolve_dtype(dtype: Any) -> np.dtype:
    """The dtype; an error if it is none of products."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        raise TypeError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}.") from None
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {name!r}.")
    return jnp.dtype(dtype)


def resolve_precision(precision: Any) -> jax.lax.Precision | None:
    """The precision of a name."""
    if precision is None or isinstance(precision, jax.lax.Precision):
        return precision
    known = {level.name.lower(): level for level in jax.lax.Precision}
    name = str(precision).lower()
    check_choice("precision", name, known)
    return known[name]


def check_float16(polynomials: Polynomials) -> None:
    """Error if a matrix of the iteration could exceed the largest number of float16."""
    limit = float(np.finfo(np.float16).max)
    if polynomials.preconditioning == "aol":
        raise ValueError(
            'preconditioning="aol" divides each row of a matrix by its own norm, and one of a '
            "small row overflows in float16. Take dtype=jnp.bfloat16 or float32, or another "
            "preconditioning."
        )
    eigenvalues = np.linspace(0, 1, 4001)
    for step in polynomials.coefficients:
        with np.errstate(over="ignore", invalid="ignore"):
            h = np.polynomial.polynomial.polyval(eigenvalues, step)
            eigenvalues = eigenvalues * h**2
        largest = max(np.abs(h).max(), eigenvalues.max())
        if not largest < limit:
            raise ValueError(
                f"With these coefficients the iteration reaches {largest:.1e}, which overflows in "
                "float16. Take dtype=jnp.bfloat16 or float32."
            )
