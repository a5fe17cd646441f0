"""The Newton-Schulz iteration X ← p(X) on a stack of matrices.

X ← aX + b(XXᵀ)X + c(XXᵀ)²X maps every singular value x of X to p(x) = ax + bx³ + cx⁵ and leaves the
singular vectors alone. With R = XXᵀ and H = aI + bR + cR² it is X ← HX, R ← HRH, so that several
steps can be taken on the small R alone: Q ← QH, and X ← QX at the end of a segment.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._checks import check_choice, check_floating
from dropmuon_jax._orthogonalize._polynomials import (
    Coefficients,
    Polynomials,
    Row,
    resolve_polynomials,
)
from dropmuon_jax._orthogonalize._segments import choose_segments

Product = Callable[[Array, Array], Array]
Orthogonalize = Callable[[Float[Array, "*batch rows cols"]], Float[Array, "*batch rows cols"]]

DTYPES = ("float32", "bfloat16", "float16")
# Unit roundoffs of products of float32 at JAX's default precision, where they are not float32's.
_TF32, _BFLOAT16 = 2.0**-11, 2.0**-8
# From this size on halves of a symmetric product are faster than the whole on a CPU: measured
# 1.10× at 768 and 1.19× at 1536 rows, and 0.96× at 512.
_SYMMETRIC_FROM = 768


def newton_schulz(
    coefficients: Coefficients = "polar_express",
    *,
    num_steps: int | None = None,
    start: str | None = None,
    dtype: Any = None,
    precision: jax.lax.Precision | str | None = None,
) -> Orthogonalize:
    r"""The kernel of :func:`newton_schulz_lmo`: a function from matrices to their polar factors.

    See there for the arguments, the accuracy and the references. The function takes an array of
    shape (\*batch, rows, cols) and returns one of the same shape, dtype and singular vectors, with
    singular values near 1.

    Raises:
        ValueError: If `coefficients`, `num_steps`, `start`, `dtype` or `precision` are not among
            the known ones, or the rows overflow in float16. By the function, for an array with
            fewer than two axes.
        TypeError: If `num_steps` is no Python integer, or `dtype` no dtype. By the function, for
            an array of anything but floating-point numbers.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> orthogonalize = dm.newton_schulz(num_steps=7)
        >>> print(orthogonalize(jnp.array([[3.0, 0.0, 0.0], [0.0, -0.1, 0.0]])).round(3))
        [[ 1.  0.  0.]
         [ 0. -1.  0.]]
    """
    polynomials = resolve_polynomials(coefficients, num_steps, start)
    precision = _check_precision(precision)
    if dtype is not None:
        dtype = _check_dtype(dtype)
        if dtype == jnp.float16:
            _check_float16(polynomials.rows)

    def orthogonalize(x: Array) -> Array:
        check_floating("the array to orthogonalize", x.dtype)
        if x.ndim < 2:
            raise ValueError(
                f"The array to orthogonalize must have shape (*batch, rows, cols), got {x.shape}."
            )
        result_dtype = x.dtype
        x = x.astype(np.promote_types(x.dtype, np.float32))
        arithmetic = x.dtype if dtype is None else dtype
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else x.mT  # XXᵀ is the smaller of the two Gram matrices
        x = _to_unit_entries(x).astype(np.promote_types(arithmetic, np.float32))
        x = jax.lax.platform_dependent(
            x,
            cpu=lambda x: _iterate_on_cpu(x, polynomials, arithmetic),
            tpu=lambda x: _iterate_in(x, polynomials, arithmetic, precision, _BFLOAT16),
            default=lambda x: _iterate_in(x, polynomials, arithmetic, precision, _TF32),
        )
        return (x if wide else x.mT).astype(result_dtype)

    return orthogonalize


def _iterate_on_cpu(x: Array, polynomials: Polynomials, dtype: Any) -> Array:
    """With full products, whatever precision is asked for, and symmetric ones in halves."""
    accumulator = np.promote_types(dtype, np.float32)
    info = jnp.finfo(dtype)

    def product(a: Array, b: Array) -> Array:
        # XLA's CPU backend sums products of bfloat16 in float32 for some shapes only, and has none
        # for the others (jax 0.10): round, then multiply in float32, for the same result.
        if dtype != accumulator:
            a, b = (jax.lax.reduce_precision(x, info.nexp, info.nmant) for x in (a, b))
        return jnp.matmul(a.astype(accumulator), b.astype(accumulator))

    def symmetric_product(a: Array, b: Array) -> Array:
        if a.shape[-1] == a.shape[-2] >= _SYMMETRIC_FROM:
            return _symmetric_product(a, b, product)
        return product(a, b)

    roundoff = float(jnp.finfo(dtype).eps) / 2
    return _iterate(x, polynomials, roundoff, product, symmetric_product)


def _iterate_in(
    x: Array,
    polynomials: Polynomials,
    dtype: Any,
    precision: jax.lax.Precision | None,
    float32_roundoff: float,
) -> Array:
    product = _product_in(dtype, precision)
    rounded = dtype == jnp.float32 and precision is not jax.lax.Precision.HIGHEST
    roundoff = float32_roundoff if rounded else float(jnp.finfo(dtype).eps) / 2
    return _iterate(x, polynomials, roundoff, product, product)


def _product_in(dtype: Any, precision: jax.lax.Precision | None) -> Product:
    """The matrix product of arrays rounded to `dtype`, summed in float32 at least."""
    accumulator = np.promote_types(dtype, np.float32)

    def product(a: Array, b: Array) -> Array:
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.matmul(a, b, precision=precision, preferred_element_type=accumulator)

    return product


def _symmetric_product(a: Array, b: Array, product: Product) -> Array:
    """AB where it is symmetric: three quarters of the operations."""
    half = a.shape[-2] // 2
    top = product(a[..., :half, :], b)
    corner = product(a[..., half:, :], b[..., half:])
    bottom = jnp.concatenate([top[..., half:].mT, corner], axis=-1)
    return jnp.concatenate([top, bottom], axis=-2)


def _iterate(
    x: Float[Array, "*batch rows cols"],
    polynomials: Polynomials,
    roundoff: float,
    product: Product,
    symmetric_product: Product,
) -> Float[Array, "*batch rows cols"]:
    rows = polynomials.eased(roundoff)
    num_rows, num_cols = x.shape[-2:]
    identity = jnp.eye(num_rows, dtype=x.dtype).reshape((1,) * (x.ndim - 2) + (num_rows, num_rows))
    steps = iter(rows)
    for segment, length in enumerate(choose_segments(rows, num_rows, num_cols, roundoff)):
        gram, q = symmetric_product(x, x.mT), identity
        scale = _START_SCALES[polynomials.start](gram) if segment == 0 else None
        if scale is not None:
            gram = scale * gram * scale.mT
        for step in range(length):
            a, b, c = next(steps)
            h = a * identity + b * gram
            h = h + c * symmetric_product(gram, gram) if c else h
            q = symmetric_product(q, h) if step else h
            if step + 1 < length:
                gram = symmetric_product(symmetric_product(gram, h), h)
        x = product(q if scale is None else q * scale.mT, x)
    return x


def _to_unit_entries(x: Float[Array, "*batch rows cols"]) -> Float[Array, "*batch rows cols"]:
    """Each matrix times a power of two, exactly, so that its largest entry is in [1/2, 1).

    The squares of 1e-30 and of 1e30 are then in range.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0))
    return jnp.ldexp(x, -exponent)


def _safe_rsqrt(x: Array) -> Array:
    return jax.lax.rsqrt(jnp.where(x == 0, 1, x))


# What the rows of X are multiplied by so that its singular values are at most 1, from XXᵀ.
_START_SCALES: dict[str, Callable[[Array], Array]] = {
    # 1 / ‖X‖_F, with ‖X‖_F² = tr XXᵀ.
    "frobenius": lambda gram: _safe_rsqrt(
        jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None],
    ),
    # 1 / ‖X‖_S4, with ‖X‖_S4² = ‖XXᵀ‖_F (Grishina et al., 2025, arXiv:2506.10935): no larger than
    # the Frobenius norm, smaller by up to rows^¼.
    "schatten": lambda gram: _safe_rsqrt(
        jnp.sqrt(jnp.sum(gram * gram, axis=(-2, -1), keepdims=True))
    ),
    # One factor a row, (Σ_j |XXᵀ|_ij)^-½ (Boissin et al., 2025, arXiv:2512.04632): what is
    # orthogonalized is then diag(s)X, whose polar factor is not that of X.
    "aol": lambda gram: _safe_rsqrt(jnp.sum(jnp.abs(gram), axis=-1, keepdims=True)),
}


def _check_dtype(dtype: Any) -> np.dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        raise TypeError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}.") from None
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {name!r}.")
    return jnp.dtype(dtype)


def _check_precision(precision: Any) -> jax.lax.Precision | None:
    if precision is None or isinstance(precision, jax.lax.Precision):
        return precision
    known = {level.name.lower(): level for level in jax.lax.Precision}
    check_choice("precision", precision, known)
    return known[precision]


def _check_float16(rows: Sequence[Row]) -> None:
    """Error if a matrix of the iteration could exceed the largest number of float16."""
    eigenvalues = np.linspace(0, 1, 4001)
    q = np.ones_like(eigenvalues)
    largest = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for a, b, c in rows:
            h = a + b * eigenvalues + c * eigenvalues**2
            q, eigenvalues = q * h, eigenvalues * h**2
            largest = np.max([largest, *(np.abs(y).max() for y in (h, q, eigenvalues))])
    if not largest < np.finfo(np.float16).max:
        raise ValueError(
            f"With these coefficients the iteration reaches {largest:.1e}, which overflows in "
            "float16. Take dtype=jnp.bfloat16 or float32."
        )
