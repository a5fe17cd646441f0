"""The polar factor of a matrix by odd polynomials.

X ← aX + b(XXᵀ)X + c(XXᵀ)²X maps every singular value x of X to p(x) = ax + bx³ + cx⁵ and leaves the
singular vectors alone, so a sequence of polynomials that drives (0, 1] towards 1 drives X = UΣVᵀ
towards its polar factor UVᵀ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._checks import check_choice, static_int


class Polynomials(NamedTuple):
    """The steps of an iteration."""

    rows: tuple[tuple[float, float, float], ...]
    """(a, b, c) of each step, in order."""
    safety: float = 1.0
    """X is divided by ‖X‖_F · safety first."""


def _polar_express() -> Polynomials:
    """Polar Express (Amsel et al., 2025, arXiv:2505.16932), optimal for [1e-3, 1].

    As in the authors' code, all rows but the last are eased by 1 % so that rounding cannot push a
    singular value out of the interval on which the next polynomial is bounded.
    """
    rows = (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    )
    ease = 1.01
    eased = tuple((a / ease, b / ease**3, c / ease**5) for a, b, c in rows[:-1])
    return Polynomials((*eased, rows[-1]), safety=ease)


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
    "polar_express": _polar_express(),
}
_DEFAULT_NUM_STEPS = 5

Coefficients = str | Sequence[Sequence[float]]


def resolve_polynomials(coefficients: Coefficients, num_steps: int | None) -> Polynomials:
    """The rows to run, one for each step.

    Args:
        coefficients: A name, whose last row is repeated where `num_steps` asks for more, or rows
            (a, b, c), each one step.
        num_steps: By default 5 for a name and the number of rows for own rows, to which it must
            then be equal if given.

    Raises:
        ValueError: For an unknown name, rows that are not (a, b, c), or a `num_steps` below 1.
        TypeError: If `num_steps` is no Python integer.
    """
    if num_steps is not None:
        num_steps = static_int(
            "num_steps",
            num_steps,
            minimum=1,
            hint="It is static: under optax.inject_hyperparams name it in static_args.",
        )
    if isinstance(coefficients, str):
        check_choice("coefficients", coefficients, POLYNOMIALS)
        known = POLYNOMIALS[coefficients]
        num_steps = num_steps or _DEFAULT_NUM_STEPS
        repeated = known.rows[-1:] * (num_steps - len(known.rows))
        return known._replace(rows=(known.rows + repeated)[:num_steps])
    rows = np.asarray(coefficients, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != 3 or not np.isfinite(rows).all():
        raise ValueError(
            "coefficients must be a name or finite rows (a, b, c), one for each step, "
            f"got an array of shape {rows.shape}. For one polynomial in every step write "
            "[(a, b, c)] * num_steps."
        )
    if num_steps is not None and num_steps != len(rows):
        raise ValueError(
            f"num_steps is {num_steps}, but coefficients have {len(rows)} rows, each one step; "
            "leave num_steps out."
        )
    return Polynomials(tuple((float(a), float(b), float(c)) for a, b, c in rows))


def orthogonalize(
    x: Float[Array, "*batch rows cols"], polynomials: Polynomials
) -> Float[Array, "*batch rows cols"]:
    """An approximate polar factor UVᵀ of each matrix; zero for a zero matrix.

    The iteration runs in float32 (float64 for float64 input) and its result has the dtype of x.
    """
    dtype = x.dtype
    x = x.astype(np.promote_types(dtype, np.float32))
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # XXᵀ is the smaller of the two Gram matrices
    x = _normalize(x, polynomials.safety)
    for a, b, c in polynomials.rows:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x if wide else x.mT).astype(dtype)


def _normalize(
    x: Float[Array, "*batch rows cols"], safety: float
) -> Float[Array, "*batch rows cols"]:
    """Each matrix divided by ‖X‖_F · safety, so that its singular values are at most 1/safety."""
    # A power of two first, to keep the squares of 1e-30 and of 1e30 in range.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0))
    x = jnp.ldexp(x, -exponent)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return x / (jnp.where(norm == 0, 1, norm) * safety)
